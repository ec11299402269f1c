"""What a plan will store, and what to know of it, before any weight moves. Names, shapes and counts, no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

from layershare.plan import SharingPlan
from layershare.sharing.layout import drop, find, resolve
from layershare.stacks import Stack

INDEX = 4
"""Bytes of an index."""


@dataclass(frozen=True)
class Prediction:
    """Counts before any weight moves. ``layer_*`` are inside the stacks; bytes are of the layers' unique parameters."""

    layer_effective: int
    layer_unique: int
    layer_bytes: int
    layer_bytes_before: int

    @property
    def ratio(self) -> float:
        """Stored layer parameters as a fraction of the original model's."""
        return self.layer_unique / self.layer_effective


def predict(stacks: Sequence[Stack], plan: SharingPlan) -> Prediction:
    """What ``plan`` will store of the (original, undropped) ``stacks``. ``layer_effective`` counts the original."""
    effective = sum(stack.size for stack in stacks)
    before = sum(w.size * w.itemsize for stack in stacks for layer in stack.layers for w in layer)
    saved, saved_bytes = 0, 0
    plans = {find(stacks, one.name).name: one for one in plan.stacks}
    for stack in stacks:
        if stack.name not in plans:
            continue
        one = plans[stack.name]
        gone = [weight for position in one.drop for weight in stack.layers[position]] if one.drop else []
        saved += sum(weight.size for weight in gone)
        saved_bytes += sum(weight.size * weight.itemsize for weight in gone)
        layout = resolve([drop(stack, one.drop)], SharingPlan(stacks=(one,)))
        for job in layout.jobs:
            less = job.weight.size * len(job.layers) - job.stored
            saved, saved_bytes = saved + less, saved_bytes + less * job.weight.itemsize
            saved_bytes -= job.indices * (INDEX - job.weight.itemsize)
        saved -= len(layout.gates)
        saved_bytes -= len(layout.gates) * stack.layers[0][0].itemsize
    return Prediction(effective, effective - saved, before - saved_bytes, before)


def remarks(stacks: Sequence[Stack], plan: SharingPlan) -> tuple[str, ...]:
    """What a reader of ``plan`` should know beside its picture, on the (original, undropped) ``stacks``: layers of
    several kinds, and what stays private although the plan names its part."""
    found: list[str] = []
    for one in plan.stacks:
        stack = find(stacks, one.name)
        if one.groups and len(stack.kinds) > 1:
            kinds = "; ".join(", ".join(map(str, positions)) for positions in stack.kinds)
            found.append(
                f"{stack.name} has layers of {len(stack.kinds)} kinds, which share only with their likes: {kinds}"
            )
        layout = resolve([drop(stack, one.drop)], SharingPlan(stacks=(one,)))
        found += [f"{stack.name}: {note}" for note in layout.notes]
    return tuple(found)
