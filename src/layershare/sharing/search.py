"""Choose a plan for a budget by what it does to the answer, not by distances between weights.

Weight distance does not predict quality (2605.30836: Frobenius error -37 %, perplexity three times as high). What a
rank is worth is read off the answer's slopes, and what a position is worth is measured: skip it, and see how far the
answer moves on calibration data.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layershare.errors import PlanError
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing.allocate import Spectrum, allocate
from layershare.sharing.convert import can_drop
from layershare.sharing.gate import add_gate, remove_gate
from layershare.sharing.layout import Job
from layershare.sharing.lowrank import root, unwhitened
from layershare.sharing.make import drop_to, spread
from layershare.sharing.moments import Moments
from layershare.sharing.price import predict
from layershare.sharing.ranks import d_rank
from layershare.sharing.statistics import texts_in
from layershare.stacks import Stack, Weight

Change = Callable[[PreTrainedModel], float]
"""How far a model's answers to the calibration data are from the original's; 0 = equal."""


class Piece(NamedTuple):
    """A matrix taken apart: its first r columns and rows give the best one of rank r."""

    spectrum: Spectrum
    up: Tensor
    """(out, full), the singular values in it."""
    down: Tensor
    """(full, in)."""


class Place(NamedTuple):
    """A position of a stack."""

    stack: str
    position: int


Missed = Callable[[tuple[Place, ...]], Place | None]
"""The positions that are gone -> the one that would be missed least beside them."""
TRIED = 512
"""Of many texts, plans are fitted on about so many to be compared; as many others judge them."""
Fitted = Callable[[SharingPlan], PreTrainedModel]
"""A plan -> a model that shares by it, fitted as it will be."""
HOPELESS = 2.0
"""A position whose loss alone changes the answer so many times as much as the best plan does is kept, without a fit of
what would be left: fits made up for half of a loss at most (docs/log.md)."""


def automatic(
    model: PreTrainedModel,
    stacks: Sequence[Stack],
    budget: float,
    judged: Callable[[], Change],
    measured: Callable[[], Moments],
    missed: Missed | None = None,
    *,
    unique: int | None = None,
    fitted: Fitted | None = None,
    pivots: bool = True,
) -> SharingPlan:
    """``auto``: low-rank factors fitted to the answer, their ranks spent where they save most of its change.

    Then one position after another is dropped, always the one that is missed least, as long as its parameters do more
    good as ranks of the others (as in ShortGPT, Men et al., 2024, 2403.03853, but judged at the answer). The plans are
    compared as they would compute, not healed: as ``fitted`` makes them, by default all maps in one go; where the next
    position is missed too much by itself (``HOPELESS``), nothing is fitted to find that out. ``unique``: drop until so
    many positions of each stack are left, whatever it does to the answer; not with ``missed``, which is
    ``least_missed`` for who keeps what it found. ``pivots``: the factors have some, for higher ranks at the same size,
    in more time. Raises PlanError if the budget is out of reach, or ``unique`` asks for less than has to stay.
    """
    change = finite(judged())
    stacks = [stack for stack in stacks if not stack.tied]
    missed = missed or (lambda gone: least_missed(model, stacks, gone, change, unique or 1))
    moments = measured()
    pieces = decompose(model, stacks, moments, pivots=pivots)
    worth = {
        place: {weight: piece.spectrum for weight, piece in some.items()} for place, some in pieces.items()
    }

    @cache
    def in_one_go(plan: SharingPlan, gone: tuple[Place, ...]) -> float:
        with _skipped(model, gone), _cut(model, pieces, plan):
            return change(model)

    @cache
    def moves(plan: SharingPlan, gone: tuple[Place, ...]) -> float:
        return in_one_go(plan, gone) if fitted is None else change(fitted(plan))

    def alone(gone: tuple[Place, ...]) -> float:
        with _skipped(model, gone):
            return change(model)

    gone: tuple[Place, ...] = ()
    best: tuple[SharingPlan, tuple[Place, ...]] | None = None
    least = ""
    if unique is not None:
        while (next_ := missed(gone)) is not None:
            gone = (*gone, next_)
        _refuse_fewer_than_stay(stacks, gone, unique)
    while True:
        try:
            plan = spend(stacks, worth, budget, gone, pivots=pivots)
        except ValueError as error:  # even the smallest ranks are too many for these positions
            least = str(error)
        else:
            if unique is not None:
                return plan
            if best is not None and moves(*best) <= moves(plan, gone):
                break
            best = plan, gone
        if (next_ := missed(gone)) is None:
            break
        gone = (*gone, next_)
        if best is not None and alone(gone) > HOPELESS * in_one_go(*best):
            break
    if best is None:
        raise PlanError(f"budget {budget:.1%} is out of reach: {least}.")
    return best[0]


def finite(change: Change) -> Change:
    """An answer that is no number is as far away as can be."""
    return lambda model: moved if math.isfinite(moved := change(model)) else math.inf


def _refuse_fewer_than_stay(stacks: Sequence[Stack], gone: Sequence[Place], unique: int) -> None:
    for stack in stacks:
        left = stack.length - sum(place.stack == stack.name for place in gone)
        if left > unique:
            raise PlanError(
                f"unique = {unique}: of the {stack.length} layers of {stack.name!r} {left} have to stay.",
                f"Give {left} or more, or leave it out.",
            )


def apart(batches: list[Any]) -> tuple[list[Any], list[Any]]:
    """Of ``batches`` those on which plans are fitted to be compared, and those that judge them: least squares flatter
    themselves on texts that they know."""
    step = max(2, texts_in(batches) // TRIED)
    return batches[::step], batches[1::step] or batches


@torch.no_grad()
def decompose(
    model: PreTrainedModel, stacks: Sequence[Stack], moments: Moments, *, pivots: bool = True
) -> dict[Place, dict[Weight, Piece]]:
    """Every linear map in the metric of the answer."""
    return {
        Place(stack.name, position): {
            weight: _piece(model, stack, position, weight, moments, pivots=pivots)
            for weight in layer if weight.factorable
        }
        for stack in stacks for position, layer in enumerate(stack.layers)
    }  # fmt: skip


def _piece(
    model: PreTrainedModel, stack: Stack, position: int, weight: Weight, moments: Moments, *, pivots: bool
) -> Piece:  # fmt: skip
    job = Job(stack.name, _factors(position, [weight.name], 1, pivots=pivots), weight, (position,))
    (name,) = job.names
    found = model.get_parameter(name)
    dense = (found.T if weight.kind == "conv1d" else found).double()
    before, after = (root(kind[name.rpartition(".")[0]]) for kind in moments)
    u, s, vh = torch.linalg.svd(after.T @ dense @ before, full_matrices=False)
    costs = torch.tensor([job.stored_at(rank) for rank in range(1, len(s) + 1)])
    spectrum = Spectrum(s.square().cpu(), costs, weight.size)
    up = unwhitened((u * s).T, after).T
    return Piece(spectrum, up.to(found.dtype), unwhitened(vh, before).to(found.dtype))


@contextmanager
def _cut(
    model: PreTrainedModel, pieces: Mapping[Place, Mapping[Weight, Piece]], plan: SharingPlan
) -> Iterator[None]:
    """``model`` computes meanwhile with the factors that ``plan`` (from ``spend``) will give it."""
    ranks = {
        (Place(stack.name, group.positions[0]), part): group.rank
        for stack in plan.stacks for group in stack.groups for part in group.parts
    }  # fmt: skip
    kept = []
    with torch.no_grad():
        for (place, part), rank in ranks.items():
            parameter = model.get_parameter(f"{place.stack}.{place.position}.{part}")
            weight, piece = next((w, piece) for w, piece in pieces[place].items() if w.name == part)
            low = piece.up[:, :rank] @ piece.down[:rank]
            kept.append((parameter, parameter.data))
            parameter.data = low.T.contiguous() if weight.kind == "conv1d" else low
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def spend(
    stacks: Sequence[Stack], worth: Mapping[Place, Mapping[Weight, Spectrum]], budget: float,
    gone: Sequence[Place] = (), *, pivots: bool = True,
) -> SharingPlan:  # fmt: skip
    """The plan that drops ``gone`` and gives the other positions the ranks worth most within ``budget``, a fraction of
    the layer parameters of all ``stacks``. Raises ValueError if the smallest ranks cost more."""
    kept = [(place, weight) for place in worth if place not in gone for weight in worth[place]]
    cost = predict(stacks, _without(stacks, gone))
    rest = cost.layer_unique - sum(weight.size for _, weight in kept)
    ranks = allocate(
        [worth[place][weight] for place, weight in kept], int(budget * cost.layer_effective) - rest
    )
    chosen = {key: rank for key, rank in zip(kept, ranks, strict=True) if rank is not None}
    return SharingPlan(stacks=tuple(_plan(stack, chosen, gone, pivots=pivots) for stack in stacks))


def _without(stacks: Sequence[Stack], gone: Sequence[Place]) -> SharingPlan:
    return SharingPlan(stacks=tuple(_plan(stack, {}, gone) for stack in stacks))


def _plan(
    stack: Stack, ranks: Mapping[tuple[Place, Weight], int], gone: Sequence[Place], *, pivots: bool = True
) -> StackPlan:  # fmt: skip
    names: dict[tuple[int, int], list[str]] = {}
    for (place, weight), rank in ranks.items():
        if place.stack == stack.name:
            names.setdefault((place.position, rank), []).append(weight.name)
    groups = tuple(
        _factors(position, parts, rank, pivots=pivots) for (position, rank), parts in sorted(names.items())
    )
    drop = tuple(place.position for place in gone if place.stack == stack.name)
    return StackPlan(name=stack.name, length=stack.length, groups=groups, drop=drop)


def _factors(position: int, parts: Sequence[str], rank: int, *, pivots: bool) -> Group:
    return Group(positions=(position,), parts=tuple(parts), method="basis", rank=rank, pivots=pivots)


def least_missed(
    model: PreTrainedModel, stacks: Sequence[Stack], gone: Sequence[Place], change: Change, keep: int = 1
) -> Place | None:
    """The position whose loss, beside ``gone``, changes the answer least, of those that can go (T5 needs its first);
    None where no more can, or no stack has more than ``keep``.

    Positions are skipped with a gate of 0, so any model works that can be gated, and nothing is rebuilt.
    """
    left = {
        stack.name: [p for p in range(stack.length) if Place(stack.name, p) not in gone] for stack in stacks
    }
    choices = [Place(name, p) for name, positions in left.items() if len(positions) > keep for p in positions]
    with _skipped(model, gone):
        costs = {}
        for place in choices:
            with _skipped(model, [place]):
                costs[place] = change(model)
    order = sorted(costs, key=costs.__getitem__)
    return next((place for place in order if can_drop(model, _without(stacks, [*gone, place]))), None)


@contextmanager
def _skipped(model: PreTrainedModel, places: Sequence[Place]) -> Iterator[None]:
    layers = [model.get_submodule(f"{place.stack}.{place.position}") for place in places]
    for layer in layers:
        add_gate(layer, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            remove_gate(layer)


def drop_only(
    model: PreTrainedModel,  # noqa: ARG001 - one signature for all
    stacks: Sequence[Stack],
    budget: float,
    judged: Callable[[], Change],  # noqa: ARG001
    measured: Callable[[], Moments],  # noqa: ARG001
    *,
    unique: int | None = None,  # noqa: ARG001
) -> SharingPlan:
    """``drop``: layer drop to compare with: as many positions as come nearest to the budget, evenly spread.

    Spread healed better than the positions that are missed most (0.8185 against 0.8167 at 50 %; docs/log.md).
    """
    kept = {stack: spread(stack.length, max(1, round(budget * stack.length))) for stack in stacks}
    return SharingPlan(stacks=tuple(drop_to(stack, positions) for stack, positions in kept.items()))


def by_effective_rank(
    model: PreTrainedModel,
    stacks: Sequence[Stack],
    budget: float,
    judged: Callable[[], Change],  # noqa: ARG001
    measured: Callable[[], Moments],
    *,
    unique: int | None = None,  # noqa: ARG001
) -> SharingPlan:
    """``d_rank``: every position its own factors, ranks by effective rank (:mod:`~layershare.sharing.ranks`)."""
    moments = measured()
    return SharingPlan(
        stacks=tuple(d_rank(model, stack, budget, moments) for stack in stacks if not stack.tied)
    )


SEARCHED: dict[str, Callable[..., SharingPlan]] = {
    "auto": automatic,
    "drop": drop_only,
    "d_rank": by_effective_rank,
}
