"""The progressive phase: the teacher's layers stand in for the student's; and training of deltas alone."""

import pytest
import torch

from laws import output
from layershare import make_plan, share
from layershare.errors import OptionError
from layershare.heal.config import DistillConfig, LossWeights
from layershare.heal.distill import distill
from layershare.heal.layers import kept_layers, matching_layers
from layershare.heal.local import layers_of
from layershare.heal.progressive import parts_in_place, replaced_at, stand_in
from layershare.heal.trained import deltas
from layershare.tasks import TASKS

EMBEDDING = TASKS["sentence-embedding"]
QUICK = DistillConfig(steps=20, batch_size=8, learning_rate=5e-3, max_length=16)


def everywhere(student, teacher):
    count = [len(part) for part in layers_of(student)]
    pairs, ours, theirs = [], 0, 0
    for mine, its in zip(count, [len(part) for part in layers_of(teacher)], strict=True):
        pairs += [(ours + i, theirs + j) for i, j in matching_layers(mine, its)]
        ours, theirs = ours + mine, theirs + its
    return parts_in_place(student, teacher, pairs)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5", "vit"])
def test_with_all_layers_replaced_it_is_the_teacher_and_behind_it_the_student_again(kind, tiny, batch_for):
    teacher, other = tiny(kind), tiny(kind)
    with torch.no_grad():
        for layer in (layer for part in layers_of(other) for layer in part):
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    student = share(other, make_plan(other, "adjacent", unique=2)) if kind != "t5" else other
    before, batch = output(student, batch_for(kind)), batch_for(kind)
    with stand_in(everywhere(student, teacher)):
        torch.testing.assert_close(output(student, batch), output(teacher, batch))
        assert not any(
            p.requires_grad for part in layers_of(teacher) for layer in part for p in layer.parameters()
        )
    assert torch.equal(output(student, batch), before)
    assert all(p.requires_grad for p in teacher.parameters())
    assert not torch.allclose(before, output(teacher, batch), atol=1e-3)


def test_a_gated_position_is_the_teachers_whole_layer(tiny, batch_for):
    teacher = tiny("bert")
    student = share(teacher, make_plan(teacher, "gated", unique=2))
    before = output(student, batch_for("bert"))
    with stand_in(everywhere(student, teacher)):
        torch.testing.assert_close(output(student, batch_for("bert")), output(teacher, batch_for("bert")))
    assert torch.equal(output(student, batch_for("bert")), before)


def test_a_layer_of_a_dropped_model_stands_for_all_up_to_what_it_is_compared_with(tiny, batch_for):
    teacher, student = tiny("bert"), tiny("bert")
    student.encoder.layer = torch.nn.ModuleList([student.encoder.layer[i] for i in (0, 3)])
    student.config.num_hidden_layers = 2
    parts = parts_in_place(student, teacher, kept_layers([0, 3], 4))
    assert [len(part.place) for part in parts] == [3, 1]
    with stand_in(parts):
        torch.testing.assert_close(output(student, batch_for("bert")), output(teacher, batch_for("bert")))
    with stand_in(parts[:1]):  # its last layer is the teacher's last one
        torch.testing.assert_close(output(student, batch_for("bert")), output(teacher, batch_for("bert")))


def test_gradients_pass_through_and_stay_out_of_the_teacher(tiny, batch_for):
    teacher, student = tiny("bert"), tiny("bert", seed=1)
    parts = everywhere(student, teacher)
    with stand_in([parts[1], parts[3]]):
        student(**batch_for("bert"))[0].square().sum().backward()
    touched = [any(p.grad is not None for p in part.layer.parameters()) for part in parts]
    assert touched == [True, False, True, False]
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_leaves_in_a_straight_line_and_never_computes_alone():
    chances = [
        sum(len(replaced_at(step, 100, 6, seed)) for seed in range(300)) / 1800 for step in (0, 50, 99)
    ]
    assert chances == pytest.approx([0.5, 0.25, 0.005], abs=0.03)
    assert replaced_at(100, 100, 6, 0) == []
    assert all(len(replaced_at(0, 10, 1, seed)) == 0 for seed in range(20))
    assert max(len(replaced_at(0, 10, 2, seed)) for seed in range(50)) == 1
    assert replaced_at(7, 10, 6, 3) == replaced_at(7, 10, 6, 3)


def test_the_phase_lasts_as_long_as_it_says_and_the_student_learns(
    tiny, tokenizer, few_pairs, tmp_path, monkeypatch
):
    import layershare.heal.distill as module

    used = []
    monkeypatch.setattr(module, "stand_in", lambda parts: used.append(len(parts)) or stand_in(parts))
    teacher = tiny("bert")
    student = share(teacher, make_plan(teacher, "cycle", unique=2, rank=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    before = EMBEDDING.evaluate(student, tokenizer, few_pairs.test, teacher=teacher)["agreement"]
    config = QUICK.model_copy(update={"local": 0.2, "progressive": 0.5})
    distill(student, teacher, tokenizer, EMBEDDING, few_pairs, config, tmp_path, quiet=True)
    assert len(used) == 10
    assert sum(used[:5]) > sum(used[5:])
    assert EMBEDDING.evaluate(student, tokenizer, few_pairs.test, teacher=teacher)["agreement"] > before


def test_what_has_no_place_is_refused(tiny, tokenizer, few_pairs, tmp_path):
    narrow = tiny("bert", hidden_size=8, num_hidden_layers=2, intermediate_size=16)
    with pytest.raises(OptionError, match="width 16 cannot stand in"):
        parts_in_place(narrow, tiny("bert"), matching_layers(2, 4))
    with pytest.raises(OptionError, match="student layer 1 no layers"):
        parts_in_place(tiny("bert"), tiny("bert"), [(0, 0), (2, 2), (3, 3)])
    with pytest.raises(OptionError, match="student layer 2 no layers"):
        parts_in_place(tiny("bert"), tiny("bert"), [(0, 0), (1, 2), (2, 1), (3, 3)])
    config = QUICK.model_copy(update={"layer_map": ((0, 3),), "progressive": 0.5})
    with pytest.raises(OptionError, match="Pair every layer"):
        distill(tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, few_pairs, config, tmp_path, quiet=True)


def test_a_teacher_that_would_compute_something_else_is_refused(tiny):
    llama, pairs = tiny("llama"), matching_layers(4, 4)
    lending = share(llama, make_plan(llama, "adjacent", unique=2, kv=True))
    with pytest.raises(OptionError, match="kv = true"):
        parts_in_place(lending, llama, pairs)
    bert = tiny("bert")
    with pytest.raises(OptionError, match="gates"):
        parts_in_place(bert, share(bert, make_plan(bert, "gated", unique=2)), pairs)
    with pytest.raises(OptionError, match="bfloat16"):
        parts_in_place(bert, tiny("bert").to(torch.bfloat16), pairs)
    with pytest.raises(OptionError, match="ends before"):
        parts_in_place(tiny("bert", num_hidden_layers=2), bert, [(0, 0), (1, 1)])
    short = tiny("t5", num_layers=2, num_decoder_layers=2)
    with pytest.raises(OptionError, match="several of them"):
        parts_in_place(short, tiny("t5"), [(0, 1), (1, 3), (2, 5), (3, 7)])


def test_a_forward_that_another_tool_put_there_comes_back(tiny):
    student, teacher = tiny("bert"), tiny("bert")
    layer, own = student.encoder.layer[0], student.encoder.layer[0].forward
    layer.forward = own
    with stand_in(everywhere(student, teacher)):
        assert layer.forward is not own
    assert layer.__dict__["forward"] is own
    assert "forward" not in student.encoder.layer[1].__dict__


def test_relations_are_compared_in_a_layer_that_stays(tiny, tokenizer, few_pairs, tmp_path):
    teacher = tiny("bert")
    student = share(teacher, make_plan(teacher, "cycle", unique=2, rank=2))
    config = QUICK.model_copy(update={"progressive": 1.0, "weights": LossWeights(relation=1.0)})
    history = distill(student, teacher, tokenizer, EMBEDDING, few_pairs, config, tmp_path, quiet=True)
    assert history


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(OptionError, match="more than all steps"):
        DistillConfig.parse({"local": 0.5, "progressive": 0.6})


# what is shared -> which leaves are a position's own
OWN = {
    "cycle": (dict(preset="cycle", unique=2, rank=2), {"up", "down"}),
    "basis": (dict(preset="basis", rank=4), {"up"}),
    "gated": (dict(preset="gated", unique=2), {"layershare_gate"}),
}


@pytest.mark.parametrize("name", OWN)
def test_deltas_alone_are_trained_and_all_else_stays_to_the_bit(name, tiny, tokenizer, few_pairs, tmp_path):
    asked, leaves = OWN[name]
    teacher = tiny("bert")
    student = share(teacher, make_plan(teacher, **asked))
    assert {
        n.rpartition(".")[2] for n, p in student.named_parameters() if any(p is d for d in deltas(student))
    } == leaves
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    config = QUICK.model_copy(update={"trained": "deltas", "keep": "last"})
    distill(student, teacher, tokenizer, EMBEDDING, few_pairs, config, tmp_path, quiet=True)
    moved = {n.rpartition(".")[2] for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved == leaves
    assert all(p.requires_grad for p in student.parameters())


def test_a_student_without_deltas_says_so(tiny, tokenizer, few_pairs, tmp_path):
    teacher = tiny("bert")
    student = share(teacher, make_plan(teacher, "all"))
    config = QUICK.model_copy(update={"trained": "deltas"})
    with pytest.raises(OptionError, match="no position has a correction"):
        distill(student, teacher, tokenizer, EMBEDDING, few_pairs, config, tmp_path, quiet=True)
