"""D-Rank: low-rank factors whose rank follows from how many directions each matrix really uses (D-Rank, 2025).

The effective rank R of a whitened matrix says how many directions carry it. Storing one more rank costs ``w`` numbers,
so with a loss that falls like R / k, the ranks that lose least within a budget are k = c sqrt(R / w), one c for all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layershare.errors import PlanError
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing.lowrank import effective_rank
from layershare.sharing.moments import Moments
from layershare.sharing.price import predict
from layershare.sharing.statistics import Grams, collect
from layershare.stacks import Stack, Weight


@dataclass(frozen=True)
class Unit:
    """One matrix, or the same one of several positions, and its effective rank."""

    positions: tuple[int, ...]
    weight: Weight
    effective: float

    @property
    def cost(self) -> int:
        """Numbers stored for each rank: one input side for all, an output side for each position."""
        out_features, in_features = _sides(self.weight)
        return in_features + len(self.positions) * out_features

    def rank(self, scale: float) -> int:
        """The rank at this ``scale``; 0 where factors would store no less than the matrices themselves."""
        wanted = max(1, round(scale * (self.effective / self.cost) ** 0.5))
        saves = wanted * self.cost < self.weight.size * len(self.positions)
        return wanted if saves and wanted < min(self.weight.shape) else 0


def fill_budget(stack: Stack, budget: float, units: Sequence[Unit], drop: Sequence[int] = ()) -> StackPlan:
    """The plan with ranks c sqrt(R / w) that stores the most within ``budget`` (a fraction of the stack's parameters).

    Matrices that would need their full rank stay whole. Raises PlanError if the budget is out of reach.
    """
    low, high, best = 0.0, 1e7, None
    for _ in range(60):
        scale = (low + high) / 2
        plan = _plan(stack, units, scale, drop)
        fits = predict([stack], SharingPlan(stacks=(plan,))).ratio <= budget
        best, low, high = (plan, scale, high) if fits else (best, low, scale)
    if best is None:
        raise PlanError(f"budget {budget:.1%} of {stack.name!r} is out of reach with ranks of at least 1.")
    return best


def d_rank(
    model: nn.Module, stack: Stack, budget: float, seen: Iterable[Mapping[str, Any]] | Moments, *,
    size: int = 1, drop: Sequence[int] = (),
) -> StackPlan:  # fmt: skip
    """Factors for every matrix of ``stack`` within ``budget``, ranks by the effective rank on what is ``seen``:
    batches, or the moments measured on them.

    size: neighbours that share an input side (1: nothing is shared). Only maps at least as wide as their inputs share
    it: grouped-query keys and values, and the second map of a feed-forward block, are slim, and lose rank when stacked
    (D-Rank groups them apart, Basis Sharing leaves them private).
    """
    kept = [position for position in range(stack.length) if position not in drop]
    names = {f"{stack.name}.{p}.{w.name}" for p in kept for w in stack.layers[p] if w.factorable}
    if isinstance(seen, Moments):
        grams = seen.inputs
    else:
        grams = collect(model, sorted(name.rpartition(".")[0] for name in names), seen)
    runs = [kept[start : start + size] for start in range(0, len(kept), size)]
    units = [unit for run in runs for unit in _units(model, stack, run, grams)]
    return fill_budget(stack, budget, units, drop)


@torch.no_grad()
def _units(model: nn.Module, stack: Stack, run: Sequence[int], grams: Grams) -> Iterable[Unit]:
    alike: dict[Weight, list[int]] = {}
    for position in run:
        for weight in stack.layers[position]:
            if weight.factorable:
                alike.setdefault(weight, []).append(position)
    for weight, positions in alike.items():
        out_features, in_features = _sides(weight)
        for group in [positions] if out_features >= in_features else [[one] for one in positions]:
            names = [f"{stack.name}.{position}.{weight.name}" for position in group]
            read = map(model.get_parameter, names)
            dense = [one.T if weight.kind == "conv1d" else one for one in read]
            seen = [grams[name.rpartition(".")[0]] for name in names]
            yield Unit(tuple(group), weight, effective_rank(dense, seen))


def _sides(weight: Weight) -> tuple[int, int]:
    return weight.shape[::-1] if weight.kind == "conv1d" else weight.shape  # type: ignore[return-value]


def _plan(stack: Stack, units: Sequence[Unit], scale: float, drop: Sequence[int]) -> StackPlan:
    names: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for unit in units:
        if rank := unit.rank(scale):
            names.setdefault((unit.positions, rank), []).append(unit.weight.name)
    groups = (
        Group(positions=positions, parts=tuple(parts), method="basis", rank=rank)
        for (positions, rank), parts in sorted(names.items())
    )
    return StackPlan(name=stack.name, length=stack.length, groups=tuple(groups), drop=tuple(drop))
