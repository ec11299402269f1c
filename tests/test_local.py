"""The local phase of healing: each layer on the teacher's hidden states, its gradient its own."""

import pytest
import torch

from laws import output
from layershare.errors import OptionError
from layershare.heal.config import DistillConfig, LossWeights
from layershare.heal.distill import distill
from layershare.heal.layers import kept_layers, matching_layers
from layershare.heal.local import by_itself, layers_of
from layershare.tasks import TASKS

EMBEDDING = TASKS["sentence-embedding"]
QUICK = DistillConfig(steps=20, batch_size=8, learning_rate=5e-3, max_length=16, local=0.5)


def spoilt(model, layer):
    """``model`` with other weights in one layer of each of its parts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for part in layers_of(model):
            for parameter in part[layer].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def states(model, batch):
    """What each layer hands on, by its place."""
    found = {}
    layers = [layer for part in layers_of(model) for layer in part]
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out, i=i: found.__setitem__(i, out[0] if isinstance(out, tuple) else out)
        )
        for i, layer in enumerate(layers)
    ]
    output(model, batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_an_error_stays_in_its_layer(kind, tiny, batch_for):
    teacher, student = tiny(kind), spoilt(tiny(kind), 1)
    batch, parts = batch_for(kind), layers_of(student)
    wanted = states(teacher, batch)
    pairs = [(i, i) for i in wanted]
    before = states(student, batch)
    with by_itself(parts, pairs, wanted):
        found = states(student, batch)
    depth = len(parts[0])
    wrong = {1, depth + 1} if len(parts) == 2 else {1}
    for i, state in found.items():
        # A decoder of another encoder's answer is wrong everywhere.
        if i < depth:
            assert torch.allclose(state, wanted[i], atol=1e-5) == (i not in wrong), i
    assert not torch.allclose(before[2], wanted[2], atol=1e-3)


def test_a_gradient_stays_in_its_layer(tiny, batch_for):
    teacher, student = tiny("bert"), tiny("bert", seed=1)
    wanted = states(teacher, batch_for("bert"))
    with by_itself(layers_of(student), matching_layers(4, 4), wanted), torch.enable_grad():
        out = student(**batch_for("bert"))[0]
        (out - wanted[3]).square().sum().backward()
    touched = [any(p.grad is not None for p in layer.parameters()) for layer in layers_of(student)[0]]
    assert touched == [False, False, False, True]


def test_a_dropped_model_reads_what_its_layers_are_compared_with(tiny, batch_for):
    """The second of the layers 0, 3 reads what the teacher's layer 3 reads: the output of layer 2."""
    teacher, student = tiny("bert"), tiny("bert")
    student.encoder.layer = torch.nn.ModuleList([student.encoder.layer[i] for i in (0, 3)])
    student.config.num_hidden_layers = 2
    wanted = states(teacher, batch_for("bert"))
    with by_itself(layers_of(student), kept_layers([0, 3], 4), wanted):
        found = states(student, batch_for("bert"))
    torch.testing.assert_close(found[1], wanted[3])


def test_the_phase_ends_and_both_bring_the_student_nearer(tiny, tokenizer, few_pairs, tmp_path, monkeypatch):
    import layershare.heal.distill as module

    used = []
    monkeypatch.setattr(module, "by_itself", lambda *given: used.append(1) or by_itself(*given))
    teacher, student = tiny("bert"), spoilt(tiny("bert"), 1)
    before = EMBEDDING.evaluate(student, tokenizer, few_pairs.test, teacher=teacher)["agreement"]
    distill(student, teacher, tokenizer, EMBEDDING, few_pairs, QUICK, tmp_path, quiet=True)
    assert len(used) == 10
    assert EMBEDDING.evaluate(student, tokenizer, few_pairs.test, teacher=teacher)["agreement"] > before


def test_what_cannot_be_local_is_refused(tiny, tokenizer, few_pairs, tmp_path):
    narrow = tiny("bert", hidden_size=8, num_hidden_layers=2, intermediate_size=16)
    weights = LossWeights(embedding=0, similarity=0)
    config = QUICK.model_copy(update={"weights": weights})
    with pytest.raises(OptionError, match="width 8 cannot read"):
        distill(narrow, tiny("bert"), tokenizer, EMBEDDING, few_pairs, config, tmp_path, quiet=True)
    config = QUICK.model_copy(update={"weights": LossWeights(hidden=0)})
    with pytest.raises(OptionError, match="compares hidden states"):
        distill(tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, few_pairs, config, tmp_path, quiet=True)
