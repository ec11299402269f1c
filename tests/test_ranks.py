"""D-Rank: effective ranks of known matrices, ranks by the formula, within the budget."""

import json

import pytest
import torch

from layershare import SharingPlan, make_plan, predict, share, verify
from layershare.errors import ModelError, OptionError, PlanError
from layershare.sharing.folder import share_folder
from layershare.sharing.layout import resolve
from layershare.sharing.lowrank import effective_rank
from layershare.sharing.moments import measure
from layershare.sharing.ranks import Unit, d_rank, fill_budget
from layershare.sharing.search import SEARCHED
from layershare.stacks import Weight, find_stacks


def test_effective_rank_counts_equal_directions():
    assert effective_rank([torch.eye(6)]) == pytest.approx(6)
    assert effective_rank([torch.diag(torch.tensor([2.0, 2, 2, 0, 0, 0]))]) == pytest.approx(3)
    assert effective_rank([torch.ones(5, 4)]) == pytest.approx(1)


def test_effective_rank_is_that_of_the_whitened_matrix():
    """exp(-sum p log p) over the singular values of W L, for any root L of the Gram matrix."""
    draw = torch.Generator().manual_seed(0)
    one, two, x = (torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    p = torch.linalg.svdvals(torch.cat([one, two]) @ torch.linalg.cholesky(x.T @ x))
    p = p / p.sum()
    assert effective_rank([one, two], [x.T @ x / 4, x.T @ x * 3 / 4]) == pytest.approx(
        float((-p * p.log()).sum().exp()), rel=1e-5
    )
    assert effective_rank([one * 7], [x.T @ x * 9]) == pytest.approx(effective_rank([one], [x.T @ x]))


def test_ranks_follow_the_root_of_effective_rank_over_cost():
    weight = Weight("w", (400, 300), "ffn", "linear", 4)
    few, many = Unit((0,), weight, 25.0), Unit((0,), weight, 100.0)
    assert many.rank(200.0) == 2 * few.rank(200.0) > 2
    pair = Unit((0, 1), weight, 100.0)
    assert (many.cost, pair.cost) == (700, 1100)
    assert pair.rank(200.0) == round(200 * (100 / 1100) ** 0.5)
    assert many.rank(1e6) == 0  # whole


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("budget", [0.5, 0.8])
def test_the_plan_fits_the_budget_and_the_model(kind, size, budget, tiny, batch_for):
    model = tiny(kind)
    for stack in find_stacks(model):
        plan = SharingPlan(stacks=(d_rank(model, stack, budget, [batch_for(kind)], size=size),))
        assert budget - 0.15 < predict([stack], plan).ratio <= budget
        assert verify(share(model, plan, calibration=[batch_for(kind)]), plan)


def test_slim_maps_are_not_stacked(tiny, batch_for):
    model = tiny("llama")
    (stack,) = find_stacks(model)
    plan = d_rank(model, stack, 0.6, [batch_for("llama")], size=2)
    shared = {part for group in plan.groups if len(group.positions) == 2 for part in group.parts}
    assert shared == {
        "self_attn.q_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
    }


def test_a_budget_out_of_reach_is_named(tiny):
    (stack,) = find_stacks(tiny("bert"))
    with pytest.raises(PlanError, match=r"1\.0%"):
        fill_budget(stack, 0.01, [Unit((0,), weight, 3.0) for weight in stack.layers[0] if weight.factorable])


def test_a_matrix_too_small_for_the_rank_of_a_basis_stays_private_with_a_note(tiny):
    model = tiny("llama")  # keys and values are 8 x 16
    plan = make_plan(model, "basis", rank=12)
    layout = resolve(find_stacks(model), plan)
    assert any(
        "self_attn.k_proj.weight [8, 16]" in note and "it stays private" in note for note in layout.notes
    )
    assert not any("k_proj" in name for job in layout.jobs for name in job.names)
    verify(share(model, plan), plan)
    with pytest.raises(PlanError, match="rank 16"):
        share(model, make_plan(model, "basis", rank=16, parts=["attention"]))


@pytest.mark.parametrize("preset", ["d_rank", "auto"])
def test_it_has_a_name_where_there_are_activations(
    preset, tiny, bert_folder, pairs_file, tmp_path, monkeypatch
):
    if preset == "d_rank":  # reads no slopes, so pays for none
        monkeypatch.setattr("layershare.sharing.moments.sensitivities", None)
    made = dict(calibration=[pairs_file], task="sentence-embedding", preset=preset)
    share_folder(bert_folder, tmp_path / "out", budget=0.6, samples=7, **made)
    plan = SharingPlan.load(tmp_path / "out" / "plan.toml")
    assert 0.5 < predict(find_stacks(tiny("bert")), plan).ratio <= 0.6
    assert {len(group.positions) for group in plan.stacks[0].groups} == {1}
    fitted = {"d_rank": "inputs", "auto": "answer"}[preset]
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["made"]
    assert (told["fit"], told["samples"], told["texts"]) == (fitted, 7, 7)
    if preset == "auto":
        share_folder(bert_folder, tmp_path / "in order", budget=0.4, samples=64, fit="sequential", **made)
        plan = SharingPlan.load(tmp_path / "in order" / "plan.toml")
        assert 0.35 < predict(find_stacks(tiny("bert")), plan).ratio <= 0.4
    unique = {"d_rank": "takes no unique = 9", "auto": "unique = 9 does not suit 4 layers"}[preset]
    for wrong, words in [
        ({}, "needs a budget"),
        ({"budget": 0.5, "rank": 3}, "takes no rank = 3"),
        ({"budget": 0.5, "unique": 9}, unique),
    ]:
        with pytest.raises(PlanError, match=words):
            share_folder(bert_folder, tmp_path / "other", **made, **wrong)
    with pytest.raises(PlanError, match="activations"):
        make_plan(tiny("bert"), preset, budget=0.5)
    with pytest.raises(OptionError, match="--samples 7 needs --calibration"):
        share_folder(bert_folder, tmp_path / "other", preset=preset, budget=0.5, samples=7)


def test_auto_takes_the_hidden_states_of_a_model_with_a_head_and_misses_a_head_aloud(
    tiny, bert_folder, tokenizer, pairs_file, tmp_path
):
    import transformers

    transformers.BertForMaskedLM(tiny("bert").config).save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    made = dict(calibration=[pairs_file], preset="auto", budget=0.6, samples=7)
    student = share_folder(tmp_path / "mlm", tmp_path / "out", task="sentence-embedding", **made)
    assert type(student) is transformers.BertModel
    with pytest.raises(ModelError, match="BertModel, which gives no answer of a BertForMaskedLM"):
        share_folder(bert_folder, tmp_path / "other", task="masked-lm", **made)
    assert not (tmp_path / "other").exists()


def test_moments_say_the_same_as_the_batches(tiny, batch_for):
    model = tiny("llama")
    (stack,) = find_stacks(model)
    batches = [batch_for("llama")]
    plan = SEARCHED["d_rank"](model, [stack], 0.6, None, lambda: measure(model, batches))
    assert plan.stacks == (d_rank(model, stack, 0.6, batches),)
