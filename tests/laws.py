"""What the tests of the core have in common: plans of every kind, and what a model computes."""

from typing import Any

import torch
from torch import Tensor

from layershare import find_stacks, make_plan
from layershare.plan import Gate, Group, SharingPlan, StackPlan

# Every preset, every merge, every method; all fit stacks of four layers.
PRESETS: dict[str, dict[str, Any]] = {
    "all": dict(preset="all"),
    "sequence": dict(preset="sequence", unique=3),
    "cycle": dict(preset="cycle", unique=2),
    "cycle_rev": dict(preset="cycle_rev", unique=2),
    "middle_cycle": dict(preset="middle_cycle", unique=3),
    "sandwich": dict(preset="sandwich", merge="first"),
    "adjacent": dict(preset="adjacent", unique=2, merge="last"),
    "drop": dict(preset="drop", unique=2),
    "drop to one": dict(preset="drop", unique=1),
    "gated": dict(preset="gated", unique=2),
    "basis": dict(preset="basis", rank=3),
    "basis budget": dict(preset="basis", budget=0.7),
    "geopair": dict(preset="geopair", rank=3),
    "atoms": dict(preset="atoms", unique=2),
    "stepwise": dict(preset="cycle", unique=2, merge="stepwise"),
    "relaxed": dict(preset="cycle", unique=2, merge="regmean", rank=2),
    "everything": dict(preset="adjacent", unique=2, parts="*"),
}
SHARED = [name for name in (*PRESETS, "diagonal", "mixed") if not name.startswith("drop")]


def plan_for(model: Any, name: str) -> SharingPlan:
    if name == "diagonal":
        return refined(make_plan(model, preset="cycle", unique=2, rank=2), diagonal=True)
    return mixed(model) if name == "mixed" else make_plan(model, **PRESETS[name])


def refined(plan: SharingPlan, **values: Any) -> SharingPlan:
    """The plan with these values in every group."""
    stacks = (
        stack.model_copy(update={"groups": tuple(group.model_copy(update=values) for group in stack.groups)})
        for stack in plan.stacks
    )
    return SharingPlan(stacks=tuple(stacks))


def mixed(model: Any) -> SharingPlan:
    """Drop, gate, tie, correct and factorise in one plan."""
    groups = (
        Group(positions=(0, 1), parts=("norm",), merge="pick", source=1),
        Group(positions=(0, 1), parts=("attention",), merge="regmean", rank=2),
        Group(positions=(1, 3), parts=("ffn",), method="basis", rank=3, side="output"),
        Group(positions=(3,), parts=("attention",), method="basis", rank=2, pivots=True),
    )
    gates = (Gate(position=1, value=0.5), Gate(position=3, value=0.25))
    stacks = (
        StackPlan(name=stack.name, length=stack.length, groups=groups, gates=gates, drop=(2,))
        for stack in find_stacks(model)
    )
    return SharingPlan(stacks=tuple(stacks))


def gates_only(model: Any, *values: float) -> SharingPlan:
    gates = tuple(Gate(position=position, value=value) for position, value in enumerate(values))
    return SharingPlan(
        stacks=tuple(StackPlan(name=s.name, length=s.length, gates=gates) for s in find_stacks(model))
    )


@torch.no_grad()
def output(model: Any, batch: dict[str, Any]) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return answer(model(**batch))


def answer(out: Any) -> Tensor:
    return out.logits if "logits" in out else out.last_hidden_state


def loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Some scalar that depends on every weight."""
    return answer(model(**batch)).sin().square().sum()


def same(left: Any, right: Any) -> bool:
    """Whether two models hold bit-identical tensors under equal names."""
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
