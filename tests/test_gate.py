"""Gates: 0 skips exactly, 1 changes nothing, and what records hidden states sees the gated ones."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Dinov2Backbone, Dinov2Config

import layershare
from laws import gates_only, loss, output, same
from layershare.architectures.inputs import run
from layershare.architectures.small import small_model
from layershare.errors import LayershareError, ModelError, TieError
from layershare.linear import GATE
from layershare.plan import Gate, SharingPlan, StackPlan
from layershare.sharing.convert import can_drop
from layershare.sharing.gate import add_gate, has_gate, remove_gate


def layers(model) -> list[nn.Module]:
    return [layer for stack in layershare.find_stacks(model) for layer in model.get_submodule(stack.name)]


def test_gates_of_one_change_nothing(tiny, batch_for, kind):
    model, batch = tiny(kind), batch_for(kind)
    gated = layershare.share(model, gates_only(model, 1, 1, 1, 1))
    assert sum(map(has_gate, layers(gated))) == len(layers(model))
    assert torch.equal(output(gated, batch), output(model, batch))


def test_gates_of_zero_skip_as_dropping_does(tiny, batch_for, kind):
    model, batch = tiny(kind), batch_for(kind)
    gated = layershare.share(model, gates_only(model, 1, 0, 1, 0))
    plans = (StackPlan(name=s.name, length=4, drop=(1, 3)) for s in layershare.find_stacks(model))
    dropped = layershare.share(model, SharingPlan(stacks=tuple(plans)))
    assert torch.equal(output(gated, batch), output(dropped, batch))
    assert not torch.equal(output(gated, batch), output(model, batch))


@pytest.mark.parametrize("stages", [None, ["stage2", "stage4"], ["stem", "stage3"]])
def test_a_backbone_hands_on_what_comes_after_the_same_layers(stages):
    sizes = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=2)
    torch.manual_seed(0)
    model = Dinov2Backbone(Dinov2Config(**sizes, out_features=stages)).eval()
    images = torch.randn(2, 3, 8, 8)
    gated = layershare.share(model, gates_only(model, 0, 1, 1, 1))
    (stack,) = layershare.find_stacks(model)
    plan = SharingPlan(stacks=(StackPlan(name=stack.name, length=4, drop=(0,)),))
    dropped = layershare.share(model, plan)
    assert dropped.config.num_hidden_layers == 3
    for ours, theirs in zip(dropped(images).feature_maps, gated(images).feature_maps, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["bamba", "beit", "data2vec-audio", "dots3_note_text", "gemma4_text"])
def test_what_a_config_and_a_table_have_of_each_layer_goes_with_it(kind):
    small = small_model(kind)
    model, inputs = small.model, small.inputs
    (stack,) = layershare.find_stacks(model)
    for gone in (0, 2):
        gated = layershare.share(model, gates_only(model, *(float(p != gone) for p in range(4))))
        plan = SharingPlan(stacks=(StackPlan(name=stack.name, length=4, drop=(gone,)),))
        assert can_drop(model, plan)
        assert all(map(torch.equal, run(layershare.share(model, plan), inputs), run(gated, inputs)))


@pytest.mark.parametrize(
    ("kind", "gone", "said"), [("gemma4_text", 3, "cannot be shortened"), ("diffllama", 1, "lambda_init is")]
)
def test_a_layer_is_kept_without_which_others_would_be_of_another_kind(kind, gone, said):
    model = small_model(kind).model
    (stack,) = layershare.find_stacks(model)
    plan = SharingPlan(stacks=(StackPlan(name=stack.name, length=4, drop=(gone,)),))
    assert not can_drop(model, plan)
    with pytest.raises(LayershareError, match=said):
        layershare.share(model, plan)


def test_between_is_between(tiny, batch_for):
    model = tiny("bert", num_hidden_layers=2)
    h0, h1, h2 = hidden(model, batch_for("bert"))
    half = hidden(layershare.share(model, gates_only(model, 0.25)), batch_for("bert"))
    torch.testing.assert_close(half[1], h0 + 0.25 * (h1 - h0))
    last = hidden(layershare.share(model, gates_only(model, 1, 0.25)), batch_for("bert"))
    torch.testing.assert_close(last[2], h1 + 0.25 * (h2 - h1))


def test_recorded_hidden_states_are_the_gated_ones(tiny, batch_for, kind):
    model, batch = tiny(kind), batch_for(kind)
    hidden(model, batch)  # installs the recorders of transformers before the gates
    states = hidden(layershare.share(model, gates_only(model, 1, 0, 1, 0.5)), batch)
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[2], states[3])


def test_recorders_that_came_first_see_the_gated_output(tiny, batch_for):
    layer, seen = layers(tiny("bert"))[0], []
    layer.register_forward_hook(lambda _, __, out: seen.append(out))
    add_gate(layer, 0.0)
    x = torch.randn(1, 3, 16)
    out = layer(x)
    first = out[0] if isinstance(out, tuple) else out
    recorded = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(first, x)
    assert torch.equal(recorded, x)


def hidden(model, batch) -> tuple:
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    return out.get("hidden_states") or out["encoder_hidden_states"]


def test_gates_learn(tiny, batch_for, kind):
    model = tiny(kind)
    gated = layershare.share(model, gates_only(model, 1, 0.5, 0, 1))
    loss(gated, batch_for(kind)).backward()
    gradients = [layer.get_parameter(GATE).grad for layer in layers(gated)]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    # FSDP refuses scalars
    assert {gradient.shape for gradient in gradients} == {(1,)}


@pytest.mark.parametrize("by_name", [True, False])
def test_hidden_states_may_come_by_name(by_name):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, hidden_states):
            return self.inner(hidden_states), "rest"

    layer, x = Layer(), torch.randn(2, 4)
    add_gate(layer, 0.0)
    out, rest = layer(hidden_states=x) if by_name else layer(x)
    assert torch.equal(out, x)
    assert rest == "rest"


def test_a_layer_that_changes_the_shape_is_refused():
    layer = nn.Sequential(nn.Linear(4, 3))
    add_gate(layer, 0.5)
    with pytest.raises(ModelError, match="Sequential does not map hidden states"):
        layer(torch.randn(2, 4))


def test_off_again(tiny, batch_for):
    model, batch = tiny("bert"), batch_for("bert")
    before = output(model, batch)
    add_gate(layers(model)[0], 0.0)
    assert not torch.equal(output(model, batch), before)
    remove_gate(layers(model)[0])
    assert torch.equal(output(model, batch), before)
    assert not has_gate(layers(model)[0])
    assert not layers(model)[0]._forward_hooks


def copied(model, monkeypatch):
    return copy.deepcopy(model)


def pickled(model, monkeypatch):
    """As in a new process, where hooks are numbered from 0 again."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("travel", [copied, pickled])
def test_gates_travel_and_no_later_hook_takes_their_place(tiny, batch_for, travel, monkeypatch):
    model, batch = tiny("bert"), batch_for("bert")
    gated = layershare.share(model, gates_only(model, 0.5, 0.25))
    twin = travel(gated, monkeypatch)
    for _ in range(50):
        layers(twin)[0].register_forward_hook(lambda *_: None)
    assert same(gated, twin)
    assert torch.equal(output(twin, batch), output(gated, batch))
    assert layershare.verify(twin).gated == 2


def test_lost_gates_are_found(tiny):
    model = tiny("bert")
    gated = layershare.share(model, gates_only(model, 0.5, 0.25))
    layers(gated)[1]._forward_hooks.clear()
    with pytest.raises(TieError, match=f"encoder.layer.1.{GATE}"):
        layershare.verify(gated)


def test_gates_work_under_autocast(tiny, batch_for, kind):
    model = tiny(kind)
    gated = layershare.share(model, gates_only(model, 1, 0, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert output(gated, batch_for(kind)).isfinite().all()


def test_gates_alone_survive_unsharing(tiny, batch_for):
    model, batch = tiny("bert"), batch_for("bert")
    plan = gates_only(model, 0.5)
    gated = layershare.share(model, plan)
    assert layershare.plan_of(layershare.unshare(gated)) == plan
    assert torch.equal(output(layershare.unshare(gated), batch), output(gated, batch))
    assert plan.stacks[0].gates == (Gate(position=0, value=0.5),)
