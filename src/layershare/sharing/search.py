"""Choose a plan for a budget by what it does to the output, not by distances between weights.

Weight distance does not predict quality (2605.30836: Frobenius error -37 %, perplexity three times as high). What a
position is worth is measured instead: skip it, and see how far the output moves on calibration data.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from layershare.errors import PlanError
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing.gate import add_gate, remove_gate
from layershare.sharing.layout import predict
from layershare.sharing.make import drop_to, gated_to, gates_of, matrix_parts, spread, users_of
from layershare.stacks import Stack, Weight

# Kept positions hold about this share of their parameters. On all-MiniLM-L6-v2 at 33 % (docs/log.md), three of them at
# 0.67 healed to a little more than two whole ones and than four at half; other densities were not tried.
DENSITY = 0.7
# From this fraction of the layer parameters on, gated ties of whole layers beat factorised ones (0.8196 against 0.8144
# Spearman at 50 %); below it, factorised ones win (0.8124 at 33 %).
GENEROUS = 0.45


def least_missed(model: nn.Module, stack: Stack, keep: int, change: Callable[[], float]) -> tuple[int, ...]:
    """The positions to drop so that ``keep`` remain, greedily: always the one whose loss changes the output least.

    ``change`` runs the model on calibration data and returns how far its output is from the original's (0 = equal).
    Positions are skipped with a gate of 0, so any model works that can be gated, and nothing is rebuilt. (Backward
    elimination as in ShortGPT, Men et al., 2024, 2403.03853, but judged at the output, after each removal anew.)
    """
    dropped: list[int] = []
    try:
        while stack.length - len(dropped) > keep:
            costs = {}
            for position in (p for p in range(stack.length) if p not in dropped):
                layer = model.get_submodule(f"{stack.name}.{position}")
                add_gate(layer, 0.0)
                costs[position] = change()
                remove_gate(layer)
            dropped.append(min(costs, key=costs.__getitem__))
            add_gate(model.get_submodule(f"{stack.name}.{dropped[-1]}"), 0.0)
    finally:
        for position in dropped:
            remove_gate(model.get_submodule(f"{stack.name}.{position}"))
    return tuple(sorted(dropped))


def automatic(
    model: nn.Module, stacks: Sequence[Stack], budget: float, change: Callable[[], float]
) -> SharingPlan:
    """``auto``: what lost least on all-MiniLM-L6-v2 after healing (docs/log.md), for each stack.

    A generous budget (``GENEROUS``) stores whole layers, evenly spread; all other positions use the nearest stored one
    behind a gate that starts at 0. A tight one drops the positions that are missed least and factorises the others.
    """
    plans = []
    for stack in stacks:
        if budget >= GENEROUS:
            kept = spread(stack.length, max(1, int(budget * stack.length + 1e-6)))
            plans.append(gated_to(stack, kept, matrix_parts(stack)))
        else:
            drop = least_missed(model, stack, positions_for(stack, budget), change)
            plans.append(factorised(stack, budget, drop))
    return SharingPlan(stacks=tuple(plans))


def drop_only(
    model: nn.Module,  # noqa: ARG001 - one signature for all
    stacks: Sequence[Stack],
    budget: float,
    change: Callable[[], float],  # noqa: ARG001
) -> SharingPlan:
    """``drop``: layer drop to compare with: as many positions as come nearest to the budget, evenly spread.

    Spread healed better than the positions that are missed most (0.8185 against 0.8167 at 50 %; docs/log.md).
    """
    kept = {stack: spread(stack.length, max(1, round(budget * stack.length))) for stack in stacks}
    return SharingPlan(stacks=tuple(drop_to(stack, positions) for stack, positions in kept.items()))


SEARCHED: dict[str, Callable[..., SharingPlan]] = {"auto": automatic, "drop": drop_only}


def positions_for(stack: Stack, budget: float) -> int:
    """How many positions to keep for ``budget`` (a fraction of the stack's parameters), so that each keeps ~70 %."""
    return min(stack.length, max(1, round(budget * stack.length / DENSITY)))


def factorised(stack: Stack, budget: float, drop: Sequence[int] = (), *, regain: bool = False) -> StackPlan:
    """Drop positions, and give every matrix of the others low-rank factors of one common density, to fit ``budget``.

    The rank of an (out, in) matrix is density * out * in / (out + in). With ``regain`` the dropped positions stay as
    gated users of the nearest kept one: they start skipped and cost only their norms, biases and gate.
    Raises PlanError if the budget is out of reach.
    """
    low, high = 0.0, 1.0
    best = None
    for _ in range(20):
        density = (low + high) / 2
        plan = _at_density(stack, density, drop, regain)
        fits = plan is not None and predict([stack], SharingPlan(stacks=(plan,))).ratio <= budget
        best, low, high = (plan, density, high) if fits else (best, low, density)
    if best is None:
        kept = stack.length - len(drop)
        raise PlanError(f"budget {budget:.1%} is out of reach for {kept} positions of {stack.name!r}.")
    return best


def _at_density(stack: Stack, density: float, drop: Sequence[int], regain: bool) -> StackPlan | None:
    kept = [position for position in range(stack.length) if position not in drop]
    users = users_of(stack, kept) if regain else {position: (position,) for position in kept}
    groups = []
    for position in kept:
        names: dict[int, list[str]] = {}
        for weight in stack.layers[position]:
            if (rank := _rank(weight, density)) is not None:
                names.setdefault(rank, []).append(weight.name)
        if not names or min(names) < 1:
            return None
        one: dict[str, Any] = {"positions": users[position], "method": "basis"}
        if len(users[position]) > 1:
            one |= {"side": "both", "merge": "pick", "source": position}
        groups += [Group(**one, parts=tuple(parts), rank=rank) for rank, parts in sorted(names.items())]
    gone = () if regain else tuple(drop)
    return StackPlan(
        name=stack.name, length=stack.length, groups=tuple(groups), gates=gates_of(users), drop=gone
    )


def _rank(weight: Weight, density: float) -> int | None:
    """None for what stays whole: no plain linear map."""
    if weight.kind == "other" or len(weight.shape) != 2:
        return None
    rows, columns = weight.shape
    return int(density * rows * columns / (rows + columns))
