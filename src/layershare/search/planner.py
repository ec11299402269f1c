"""From a choice to a plan that spends the whole budget: groups as chosen, ranks where they save most of the change."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from layershare.errors import PlanError
from layershare.plan import Gate, Group, SharingPlan, StackPlan
from layershare.search.fitting import Fitted
from layershare.search.space import GROUPINGS, Choice, Space
from layershare.sharing.allocate import Spectrum, allocate
from layershare.sharing.layout import Job
from layershare.sharing.price import predict
from layershare.sharing.search import Place
from layershare.stacks import Stack, Weight

MOST_KINDS = 12
"""Beyond so many kinds of matrices, parts are favoured instead."""


class Item(NamedTuple):
    """A matrix of some positions that go together."""

    stack: Stack
    weight: Weight
    positions: tuple[int, ...]
    group: Group
    """Its rank is still to be found."""


def space_of(stacks: Sequence[Stack], order: Sequence[Place], tables: Sequence[float] = (1.0,)) -> Space:
    """What there is to choose on these stacks. ``order``: positions that may be dropped, least missed first."""
    weights = [w for stack in stacks for layer in stack.layers for w in layer if w.factorable]
    parts = tuple(dict.fromkeys(weight.part for weight in weights))
    kinds = tuple(dict.fromkeys(map(kind_of, weights)))
    return Space(parts, kinds if len(kinds) <= MOST_KINDS else parts, len(order), tuple(tables))


def kind_of(weight: Weight) -> str:
    """The name inside the layer, without the numbers of experts: ``attention.self.query``."""
    return re.sub(r"\b\d+\b", "*", weight.name.removesuffix(".weight"))


def plan_of_choice(
    stacks: Sequence[Stack], choice: Choice, budget: float, fitted: Fitted, order: Sequence[Place]
) -> SharingPlan:
    """The plan meant by ``choice``, which stores at most ``budget``, a fraction of the layer parameters of all stacks.

    Raises PlanError where even the smallest ranks are too many.
    """
    gone, gated = order[: choice.dropped], order[choice.dropped : choice.dropped + choice.gated]
    plain = SharingPlan(stacks=tuple(_framed(stack, gone, gated, choice.gate) for stack in stacks))
    users = {place: user for place in gated if (user := _owner(stacks, place, [*gone, *gated])) is not None}
    if len(users) < len(gated):
        raise PlanError("a gated position has no neighbour of its kind left to take weights from.")
    items = [item for stack in stacks for item in _items(stack, choice, [*gone, *gated])]
    fixed = [item.weight.size if item.group.method == "tie" else 0 for item in items]
    spectra = [_spectrum(item, choice, fitted, part) for item, part in zip(items, fixed, strict=True)]
    cost = predict(stacks, plain)
    # What stays as it is: all but the matrices that are items here, or that a gated position takes from one.
    covered = sum(item.weight.size * len(item.positions) for item in items) + sum(
        weight.size for place in gated for weight in _layer(stacks, place) if weight.factorable
    )
    room = int(budget * cost.layer_effective) - (cost.layer_unique - covered) - sum(fixed)
    try:
        ranks = allocate(spectra, room)
    except ValueError as error:
        raise PlanError(f"{error}, {room} are left.") from None
    groups = [list[Group]() for _ in stacks]
    merged: dict[tuple[str, Group], list[str]] = {}
    for item, rank in zip(items, ranks, strict=True):
        taken = [
            place.position
            for place, user in users.items()
            if user == Place(item.stack.name, item.positions[0])
        ]
        if group := _final(item.group, rank, taken):
            merged.setdefault((item.stack.name, group), []).append(item.weight.name)
    for (name, group), parts in merged.items():
        number = next(i for i, stack in enumerate(stacks) if stack.name == name)
        groups[number].append(group.model_copy(update={"parts": tuple(parts)}))
    made = [
        one.model_copy(update={"groups": tuple(found)})
        for one, found in zip(plain.stacks, groups, strict=True)
    ]
    plan = SharingPlan(stacks=tuple(made))
    if (ratio := predict(stacks, plan).ratio) > budget:
        raise PlanError(f"it would store {ratio:.1%}.")
    return plan


def _framed(stack: Stack, gone: Sequence[Place], gated: Sequence[Place], gate: float) -> StackPlan:
    here = [[p.position for p in places if p.stack == stack.name] for places in (gone, gated)]
    gates = tuple(Gate(position=position, value=gate) for position in sorted(here[1]))
    return StackPlan.parse(
        {"name": stack.name, "length": stack.length, "gates": gates, "drop": tuple(here[0])}, error=PlanError
    )


def _layer(stacks: Sequence[Stack], place: Place) -> tuple[Weight, ...]:
    return next(stack for stack in stacks if stack.name == place.stack).layers[place.position]


def _owner(stacks: Sequence[Stack], place: Place, absent: Sequence[Place]) -> Place | None:
    """The nearest position of the same kind that has weights of its own, the earlier of two."""
    stack = next(stack for stack in stacks if stack.name == place.stack)
    alike = next(kind for kind in stack.kinds if place.position in kind)
    left = [p for p in alike if Place(stack.name, p) not in absent]
    nearest = min(left, key=lambda p: (abs(p - place.position), p), default=None)
    return None if nearest is None else Place(stack.name, nearest)


def _items(stack: Stack, choice: Choice, absent: Sequence[Place]) -> Iterator[Item]:
    where: dict[Weight, list[int]] = {}
    for position, layer in enumerate(stack.layers):
        if Place(stack.name, position) not in absent:
            for weight in layer:
                if weight.factorable:
                    where.setdefault(weight, []).append(position)
    for weight, positions in where.items():
        # A gated position takes what one other position has: then nothing else is shared.
        grouping = "alone" if choice.gated else choice.groups.get(weight.part, "alone")
        for group in GROUPINGS[grouping](positions):
            method = choice.methods.get(weight.part, "input")
            yield Item(stack, weight, group, _group(group, weight, method, pivots=not choice.gated))


def _group(positions: tuple[int, ...], weight: Weight, method: str, *, pivots: bool) -> Group:
    """``pivots``: of factors that one position has for itself, and no gated one takes."""
    how: dict = {"method": "basis", "side": "input", "pivots": pivots}
    if len(positions) > 1:
        how = {"method": "basis", "side": method} if method in ("input", "output") else {"merge": method}
    return Group(positions=positions, parts=(weight.name,), rank=1, **how)


def _spectrum(item: Item, choice: Choice, fitted: Fitted, fixed: int) -> Spectrum:
    """What ranks are worth, bent as chosen."""
    job = Job(item.stack.name, item.group, item.weight, item.positions)
    weight, last = item.weight, max(item.stack.length - 1, 1)
    middle = sum(item.positions) / len(item.positions)
    favour = choice.favours.get(kind_of(weight), choice.favours.get(weight.part, 0.0))
    favour += choice.depth * (2 * middle / last - 1)
    energies: Tensor = fitted.energies(job).clamp_min(0).pow(choice.power) * 2**favour
    energies = energies[: min(weight.shape) - 1]  # factors of full rank are refused
    costs = torch.tensor([job.stored_at(rank) - fixed for rank in range(1, len(energies) + 1)])
    return Spectrum(energies, costs, weight.size * len(item.positions) - fixed)


def _final(group: Group, rank: int | None, gated: Sequence[int]) -> Group | None:
    """The group at its rank, with the gated positions that take its weights; None where nothing is shared."""
    positions = (*group.positions, *gated)
    if rank is None:  # left as it is
        if not gated:
            return None
        return Group(positions=positions, parts=("*",), merge="pick", source=group.positions[0])
    if not gated:
        return group.model_copy(update={"rank": rank, "parts": ("*",)})
    return Group(
        positions=positions, parts=("*",), method="basis", rank=rank, side="both", merge="pick",
        source=group.positions[0],
    )  # fmt: skip
