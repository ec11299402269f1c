"""Embedding tables in two factors: optimal, one object for all uses, and the model goes on as stock code expects."""

import copy
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open

from laws import loss, output, same
from layershare import SharingPlan, make_plan, plan_of, predict, share, unshare, verify
from layershare.errors import DataError, ModelError, PlanError, TieError
from layershare.plan import Table
from layershare.sharing.embedding import DOWN, count_tokens, factor_table, main_table, tables_of
from layershare.sharing.tie import count, layout_of
from layershare.sharing.whole import model_bytes, whole_plan
from layershare.stacks import find_stacks

TEXT = ["bert", "gpt2", "llama", "t5"]
TIED = [("llama", True), ("llama", False), ("gpt2", True), ("t5", True), ("bert", True)]


def factored(model, rank=10, **more):
    return share(model, SharingPlan(tables=(Table(name=main_table(model), rank=rank),)), **more)


def table_of(rows=12, columns=6):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_factors_reach_the_bound_of_the_weighted_svd(rank):
    table, counts = table_of(), torch.arange(12.0) ** 2
    up, down = factor_table(table, rank, counts)
    assert (up.shape, down.shape) == ((12, rank), (rank, 6))
    often = np.sqrt(counts.numpy() + 1)[:, None]
    singular = np.linalg.svd(often * table.numpy(), compute_uv=False)
    found = np.square(often * (table - up @ down).numpy()).sum()
    assert found == pytest.approx(np.square(singular[rank:]).sum())


def test_the_full_rank_is_exact_and_balanced():
    up, down = factor_table(table_of(), 6)
    torch.testing.assert_close(up @ down, table_of())
    torch.testing.assert_close(up.square().mean(), down.square().mean())


def test_frequent_tokens_are_kept_better():
    table, counts = table_of(), torch.zeros(12)
    counts[3] = 1000
    errors = [float((table - torch.matmul(*factor_table(table, 2, c)))[3].norm()) for c in (None, counts)]
    assert errors[1] < 0.1 * errors[0]


def test_tokens_are_counted_without_padding(tiny):
    model = tiny("bert")
    (job,) = tables_of(model, SharingPlan(tables=(Table(name=main_table(model), rank=2),)))
    batch = {
        "input_ids": torch.tensor([[5, 5, 7], [8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    }
    counts = count_tokens(model, job, [batch, batch])
    assert {i: int(n) for i, n in enumerate(counts) if n} == {5: 4, 7: 2, 8: 2}
    with pytest.raises(DataError, match="word_embeddings"):
        count_tokens(model, job, [])


@pytest.mark.parametrize(("kind", "tied"), TIED)
def test_the_model_computes_with_the_product_everywhere(kind, tied, tiny, batch_for):
    model, batch = tiny(kind, tie_word_embeddings=tied), batch_for(kind)
    student = factored(model, calibration=[batch])
    module = student.get_submodule(main_table(student))
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.get_input_embeddings().weight.copy_(module.weight @ module.get_parameter(DOWN))
    torch.testing.assert_close(output(student, batch), output(dense, batch))
    torch.testing.assert_close(output(unshare(student), batch), output(student, batch))
    assert plan_of(unshare(student)) is None


@pytest.mark.parametrize(("kind", "tied"), TIED)
def test_what_is_saved_loads_the_same_and_once(kind, tied, tiny, batch_for, tmp_path):
    model, batch = tiny(kind, tie_word_embeddings=tied), batch_for(kind)
    student = factored(model)
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == count(student).unique
    loaded = type(model).from_pretrained(tmp_path)
    verify(loaded)
    assert same(loaded, student)
    assert torch.equal(output(loaded, batch), output(student, batch))


@pytest.mark.parametrize("kind", TEXT)
def test_copies_and_stock_ties_leave_it_as_it_is(kind, tiny, batch_for):
    student = factored(tiny(kind))
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):  # noqa: S301
        other.tie_weights()
        verify(other)
        assert torch.equal(output(other, batch_for(kind)), output(student, batch_for(kind)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_optimizer_step_keeps_one_table_and_uses_both_gradients(kind, tiny, batch_for):
    student = factored(tiny(kind, tie_word_embeddings=True))
    before = student.get_input_embeddings().get_parameter(DOWN).clone()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    loss(student, batch_for(kind)).backward()
    optimizer.step()
    verify(student)
    head = student.get_output_embeddings()
    assert head.weight is student.get_input_embeddings().weight
    assert head.get_parameter(DOWN) is student.get_input_embeddings().get_parameter(DOWN)
    assert not torch.equal(before, head.get_parameter(DOWN))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_resizing_for_new_tokens_works_on_the_factored_table(kind, tiny, batch_for, tmp_path):
    student, batch = factored(tiny(kind)), batch_for(kind)
    before = output(student, batch)
    student.resize_token_embeddings(40, mean_resizing=False)
    verify(student)
    wide = output(student, batch)
    assert torch.equal(wide[..., : before.shape[-1]], before)
    student.save_pretrained(tmp_path)
    assert torch.equal(output(type(student).from_pretrained(tmp_path), batch), wide)


def test_scaled_embeddings_keep_their_scale(batch_for):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = dict(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, head_dim=8, intermediate_size=32, pad_token_id=0)
    ).eval()
    student = factored(model, rank=15)
    dense, module = copy.deepcopy(model), student.get_submodule(main_table(student))
    with torch.no_grad():
        dense.get_input_embeddings().weight.copy_(module.weight @ module.get_parameter(DOWN))
    torch.testing.assert_close(output(student, batch_for("llama")), output(dense, batch_for("llama")))


@pytest.mark.parametrize(("what", "amount"), [("positions", 1), ("neurons", 4)])
def test_pruning_leaves_the_table_in_its_factors(what, amount, tiny, batch_for):
    from layershare.prune import PruneConfig, prune

    student = factored(tiny("llama", tie_word_embeddings=True))
    cut = prune(student, PruneConfig.parse({"by": "magnitude", "what": what, "amount": amount}))
    assert verify(cut).tied == 2
    assert torch.equal(cut.model.embed_tokens.weight, student.model.embed_tokens.weight)
    assert output(cut, batch_for("llama")).isfinite().all()


def test_a_lost_factor_is_found(tiny):
    student = factored(tiny("llama", tie_word_embeddings=True))
    student.lm_head.register_parameter(
        DOWN, torch.nn.Parameter(student.lm_head.get_parameter(DOWN).detach().clone())
    )
    with pytest.raises(TieError, match=f"lm_head.{DOWN}"):
        verify(student)


@pytest.mark.parametrize(
    ("name", "rank", "words"),
    [("embeddings.word_embedding", 4, "word_embeddings"), ("embeddings.word_embeddings", 16, "width")],
    ids=["unknown", "too high"],
)
def test_what_does_not_fit_is_named(name, rank, words, tiny):
    with pytest.raises(PlanError) as caught:
        share(tiny("bert"), SharingPlan(tables=(Table(name=name, rank=rank),)))
    assert words in str(caught.value)


def test_a_table_planned_twice_is_an_error():
    table = {"name": "a", "rank": 1}
    with pytest.raises(PlanError, match="planned twice"):
        SharingPlan.from_dict({"tables": [table, table]})


def test_a_table_renormalised_in_place_is_refused(tiny):
    model = tiny("bert")
    model.embeddings.word_embeddings.max_norm = 1.0
    with pytest.raises(ModelError, match="word_embeddings"):
        factored(model)


def test_a_model_without_tokens_has_no_table(tiny):
    with pytest.raises(ModelError, match="no table"):
        main_table(tiny("vit"))


@pytest.mark.parametrize("fit", ["inputs", "answer", "sequential"])
def test_a_table_and_layers_are_shared_together(fit, tiny, batch_for):
    model, batch = tiny("llama", tie_word_embeddings=True), batch_for("llama")
    plan = make_plan(model, "basis", rank=3).model_copy(
        update={"tables": (Table(name=main_table(model), rank=9),)}
    )
    assert SharingPlan.from_toml(plan.to_toml()) == plan
    assert "factors of rank 9" in str(plan)
    student = share(model, plan, calibration=[batch], fit=fit)
    assert verify(student, plan).counts.bytes_unique == model_bytes(model, plan)[1]
    assert len(layout_of(student, plan).tables) == 1


@pytest.mark.parametrize("kind", TEXT)
def test_the_whole_model_stays_within_its_bytes(kind, tiny, batch_for):
    model, batch = tiny(kind, vocab_size=400), batch_for(kind)

    def change(student):
        return float((output(student, batch) - output(model, batch)).square().mean())

    before = count(model).bytes_unique
    seen = []
    plan = whole_plan(
        model,
        0.6,
        lambda b: make_plan(model, "basis", budget=b),
        lambda s: seen.append(change(s)) or seen[-1],
    )
    assert model_bytes(model, plan) == (before, count(share(model, plan)).bytes_unique)
    assert count(share(model, plan)).bytes_unique <= 0.6 * before
    assert len(seen) > 1
    assert change(share(model, plan)) == min(seen)
    same_in_bytes = whole_plan(
        model, int(0.6 * before), lambda b: make_plan(model, "basis", budget=b), change
    )
    assert same_in_bytes == plan


def test_a_whole_model_that_needs_more_is_refused(tiny):
    model = tiny("bert")
    with pytest.raises(PlanError, match="bytes"):
        whole_plan(model, 0.01, lambda b: make_plan(model, "basis", budget=b), lambda _: 0.0)


def test_predictions_of_the_layers_are_not_touched_by_tables(tiny):
    model = tiny("bert")
    plan = SharingPlan(tables=(Table(name=main_table(model), rank=4),))
    assert predict(find_stacks(model), plan).ratio == 1
