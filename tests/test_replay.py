"""Replaying settled layers: the same bits as computing them again, fewer calls, and never where it would be wrong."""

import pytest
import torch

from laws import output, same
from layershare import make_plan, share
from layershare.sharing import sequential
from layershare.sharing.gate import add_gate
from layershare.sharing.replay import Replay, replayable
from layershare.stacks import find_stacks


def calls(model, stack):
    """A list that grows with the layers that are computed."""
    found = []
    for i, layer in enumerate(model.get_submodule(stack)):
        inner = next(
            m for m in layer.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"
        )
        inner.register_forward_pre_hook(lambda *_, i=i: found.append(i))
    return found


def test_settled_layers_say_what_they_said(kind, tiny, batch_for):
    model, batch = tiny(kind), batch_for(kind)
    stacks = [stack.name for stack in find_stacks(model)]
    assert replayable(model, stacks, batch)
    wanted, replay = output(model, batch), Replay(model)
    found = calls(model, stacks[-1])
    for count, computed in ((1, [0, 1, 2, 3]), (1, [1, 2, 3]), (3, [1, 2, 3]), (3, [3])):
        found.clear()
        with replay.run(0, dict.fromkeys(stacks, count)):
            assert torch.equal(output(model, batch), wanted)
        assert list(dict.fromkeys(found)) == computed
    found.clear()
    assert torch.equal(output(model, batch), wanted)
    assert list(dict.fromkeys(found)) == [0, 1, 2, 3]


def test_each_batch_has_its_own(tiny, batch_for):
    model, one = tiny("bert"), batch_for("bert")
    other = {name: value.flip(1) for name, value in one.items()}
    replay = Replay(model)
    wanted = [output(model, batch) for batch in (one, other)]
    for _ in range(2):
        for number, batch in enumerate((one, other)):
            with replay.run(number, {"encoder.layer": 2}):
                assert torch.equal(output(model, batch), wanted[number])


def test_layers_that_need_more_than_the_last_one_are_not_replayed(tiny, batch_for):
    model, batch = tiny("bert"), batch_for("bert")
    layers, kept = model.encoder.layer, {}
    layers[0].output.dense.register_forward_hook(lambda _, __, out: kept.update(said=out))
    layers[3].output.dense.register_forward_hook(lambda _, __, out: out + kept.pop("said"))
    output(model, batch)
    assert not replayable(model, ["encoder.layer"], batch)
    gated = tiny("bert")
    add_gate(gated.encoder.layer[1], 0.5)
    assert not replayable(gated, ["encoder.layer"], batch)


@pytest.mark.parametrize("dropped", [False, True])
def test_sequential_calibration_gives_the_same_bits_with_and_without(
    kind, dropped, tiny, batch_for, monkeypatch
):
    from layershare.plan import Group, SharingPlan, StackPlan

    model = tiny(kind)
    if dropped:
        groups = (Group(positions=(0, 3), method="basis", rank=4),)
        plan = SharingPlan(
            stacks=tuple(
                StackPlan(name=s.name, length=4, groups=groups, drop=(1, 2)) for s in find_stacks(model)
            )
        )
    else:
        plan = make_plan(model, "basis", rank=4)
    batches = [batch_for(kind)] * 2
    fast = share(model, plan, calibration=batches, fit="sequential")
    monkeypatch.setattr(sequential, "replayable", lambda *_: False)
    assert same(fast, share(model, plan, calibration=batches, fit="sequential"))
