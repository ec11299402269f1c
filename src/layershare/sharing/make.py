"""make_plan: from a preset and a number, or a budget, to a plan for one model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from layershare import presets
from layershare.errors import PlanError, nearest
from layershare.plan import Gate, Group, SharingPlan, StackPlan
from layershare.sharing.layout import factors, find, matches
from layershare.sharing.price import predict
from layershare.stacks import Stack, find_stacks

PlanMerge = Literal["first", "last", "mean", "regmean", "stepwise"]
# Shared bases, and how each is fitted.
BASES: dict[str, Literal["svd", "geopair"]] = {"basis": "svd", "geopair": "geopair"}
# What needs activations, see layershare.sharing.search.
MEASURED = ("auto", "d_rank")
SCHEMES = (*presets.PRESETS, "drop", "gated", *BASES, "atoms")


def make_plan(
    model: nn.Module | Sequence[Stack], preset: str = "adjacent", *,
    unique: int | None = None, budget: float | None = None, parts: Sequence[str] | None = None,
    stack: str | Sequence[str] | None = None, merge: PlanMerge = "mean", rank: int = 0, kv: bool = False,
) -> SharingPlan:  # fmt: skip
    """A plan by name for ``model`` (or for its stacks).

    preset: a published scheme (``layershare.presets``), or ``drop`` (keep evenly spaced positions, drop the others),
        ``gated`` (all positions, tied to those that ``drop`` would keep and gated, the others starting at 0),
        ``basis`` (a shared basis over pairs of neighbours, its rank from the budget) or ``geopair`` (the same, each
        position in the metric of its own activations), or ``atoms`` (each matrix a mix of ``unique`` shared ones).
    unique: distinct layers a stack; or budget: the most stored layer parameters, as a fraction (0 < budget < 1) of the
        planned stacks' own, from which ``unique`` (for a basis: ``rank``) is chosen.
    parts: part names or globs; default all weight matrices. stack: names of the stacks to share, default all.
    merge, rank: for tied groups, see :class:`~layershare.plan.Group`; ``basis`` takes a rank in place of ``unique``.
        ``stepwise`` picks evenly spaced positions, one for each unique layer, wherever its users are (2410.20672).
    kv: the first position of each tied group computes keys and values for all of it (cross-layer, 2405.12981).

    Raises :class:`~layershare.errors.PlanError` naming the nearest preset, stack or part, or the least budget possible.
    """
    if preset in MEASURED:
        raise PlanError(
            f"preset {preset!r} is read off the model's activations.",
            "Give calibration data: share --calibration, compress --scheme, or plan --data.",
        )
    if preset not in SCHEMES:
        raise PlanError(f"unknown preset {preset!r}.", nearest(preset, SCHEMES))
    if preset in ("drop", "gated", "atoms", *BASES) and (merge != "mean" or (rank and preset not in BASES)):
        raise PlanError(
            f"preset {preset!r} takes no {f'merge {merge!r}' if merge != 'mean' else f'rank {rank}'}."
        )
    if kv and preset not in presets.PRESETS:
        raise PlanError(
            f"preset {preset!r} takes no kv: it ties no whole groups.", nearest("adjacent", presets.PRESETS)
        )
    name, number = ("rank", rank or None) if preset in BASES else ("unique", unique)
    if preset in BASES and unique is not None:
        raise PlanError(f"preset {preset!r} takes no unique = {unique}.", "Give its rank, or a budget.")
    if (number is None) == (budget is None) and not (preset in presets.FIXED and budget is None):
        raise PlanError(f"preset {preset!r} needs either {name} or budget.")
    if budget is not None and not 0 < budget < 1:
        raise PlanError(
            f"budget {budget:g} is not a fraction of the layer parameters.", "Give one between 0 and 1."
        )
    found = find_stacks(model) if isinstance(model, nn.Module) else tuple(model)
    parts = [parts] if isinstance(parts, str) else parts
    names = [stack] if isinstance(stack, str) else stack
    chosen = found if names is None else tuple(dict.fromkeys(find(found, name) for name in names))
    if open_ := [one for one in chosen if one.tied]:
        raise PlanError(f"stack {open_[0].name!r} is shared already.")
    plans = []
    for one in chosen:
        wanted = tuple(parts) if parts is not None else matrix_parts(one)
        make = _scheme(preset, one, wanted, merge, rank, kv)
        chosen_number = _within(one, preset, make, wanted, budget) if budget is not None else number
        plans.append(make(presets.FIXED[preset] if chosen_number is None else chosen_number))
    return SharingPlan(stacks=tuple(plans))


def matrix_parts(stack: Stack) -> tuple[str, ...]:
    """The parts of the stack that hold weight matrices."""
    return tuple(part for part in ("attention", "ffn", "other") if stack.parameters[part])


def _scheme(
    preset: str, stack: Stack, parts: tuple[str, ...], merge: PlanMerge, rank: int, kv: bool
) -> Callable[[int], StackPlan]:
    """A function from the number to choose (unique layers; for ``basis`` the rank) to the stack's plan."""
    if preset == "drop":
        return lambda unique: drop_to(stack, spread(stack.length, unique))
    if preset == "gated":
        return lambda unique: gated_to(stack, spread(stack.length, unique), parts)
    if preset == "atoms":
        return lambda unique: atoms_over(stack, parts, unique)
    if preset in BASES:
        pairs = _assign("adjacent", stack, -(-stack.length // 2))
        return lambda rank: basis_over(stack, pairs, parts, rank, BASES[preset])
    return lambda unique: StackPlan(
        name=stack.name, length=stack.length,
        groups=_having(stack, tied(_assign(preset, stack, unique), parts, merge, rank, kv)),
    )  # fmt: skip


def _assign(preset: str, stack: Stack, unique: int) -> presets.Assignment:
    """The unique layer of each position. Where layers are of several kinds, the scheme is laid over each kind apart,
    with its proportion of the unique layers: unlike layers have nothing to share."""
    whole = presets.assign(preset, stack.length, unique)
    if len(stack.kinds) == 1:
        return whole
    used: dict[int, int] = {}
    for positions in stack.kinds:
        choices = presets.unique_choices(preset, len(positions)) or range(len(positions), len(positions) + 1)
        wanted = min(max(round(unique * len(positions) / stack.length), choices[0]), choices[-1])
        own = (
            presets.PRESETS[preset](len(positions), wanted)
            if wanted < len(positions)
            else range(len(positions))
        )
        used |= {position: positions[number] for position, number in zip(positions, own, strict=True)}
    return tuple(used[position] for position in range(stack.length))


def _within(
    stack: Stack, preset: str, make: Callable[[int], StackPlan], parts: Sequence[str], budget: float,
) -> int:  # fmt: skip
    """The largest number whose plan stays within ``budget``."""
    choices: Iterable[int]
    if preset in BASES:
        sides = [
            min(w.shape) for layer in stack.layers for w in layer if any(factors(w, part) for part in parts)
        ]
        choices = range(1, max(sides, default=0))
    else:
        choices = (
            presets.unique_choices(preset, stack.length)
            if preset in presets.PRESETS
            else range(1, stack.length + 1)
        )
    low, high = 0, len(choices := list(choices)) - 1
    if not choices or (least := _price(stack, make(choices[0]))) > budget:
        offer = (
            f"the least that {preset!r} stores is {least:.1%}"
            if choices
            else f"{preset!r} suits no length of it"
        )
        raise PlanError(
            f"budget {budget:.1%} of {stack.name!r} is out of reach: {offer}.",
            "Choose another preset or budget.",
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(stack, make(choices[middle]), budget) else (low, middle - 1)
    return choices[low]


def _fits(stack: Stack, plan: StackPlan, budget: float) -> bool:
    try:
        return _price(stack, plan) <= budget
    except PlanError:  # a rank above what some matrix of the group allows
        return False


def _price(stack: Stack, plan: StackPlan) -> float:
    return predict([stack], SharingPlan(stacks=(plan,))).ratio


def tied(
    assignment: Sequence[int],
    parts: Sequence[str],
    merge: PlanMerge = "mean",
    rank: int = 0,
    kv: bool = False,
) -> tuple[Group, ...]:
    """Groups of positions with the same unique layer; positions that are alone stay private."""
    groups = [_positions(assignment, unique) for unique in dict.fromkeys(assignment)]
    made: list[dict[str, Any]] = [{"merge": merge} for _ in groups]
    if merge == "stepwise":
        made = [{"merge": "pick", "source": source} for source in spread(len(assignment), len(groups))]
    return tuple(
        _group(positions=p, parts=parts, rank=rank, kv=kv, **how)
        for p, how in zip(groups, made, strict=True)
        if len(p) > 1
    )


def _group(**values: object) -> Group:
    return Group.parse(values, error=PlanError)


def _having(stack: Stack, groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups, each with the parts that its layers have: where layers are of several kinds, some lack attention.

    A part that no layer of the stack has stays, for ``resolve`` to complain about.
    """

    def has(positions: Iterable[int], part: str) -> bool:
        return any(matches(weight, part) for position in positions for weight in stack.layers[position])

    absent = [(group, [p for p in group.parts if has(range(stack.length), p) and not has(group.positions, p)])
              for group in groups]  # fmt: skip
    kept = ((group, tuple(part for part in group.parts if part not in gone)) for group, gone in absent)
    return tuple(group.model_copy(update={"parts": parts}) for group, parts in kept if parts)


def _positions(assignment: Sequence[int], unique: int) -> tuple[int, ...]:
    return tuple(position for position, used in enumerate(assignment) if used == unique)


def spread(length: int, unique: int) -> tuple[int, ...]:
    """``unique`` positions evenly spaced from the first to the last, both included ("Stepwise", 2410.20672)."""
    if not 1 <= unique <= length:
        raise PlanError(f"unique = {unique} does not suit {length} layers.", f"Give 1 to {length}.")
    return tuple(int(i * (length - 1) / max(unique - 1, 1) + 0.5) for i in range(unique))


def drop_to(stack: Stack, kept: Sequence[int]) -> StackPlan:
    """Keep only these positions."""
    gone = tuple(position for position in range(stack.length) if position not in kept)
    return StackPlan(name=stack.name, length=stack.length, drop=gone)


def users_of(stack: Stack, kept: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """For each kept position those that use its weights: each the nearest kept one of its kind, the earlier of two."""
    kind = {position: number for number, positions in enumerate(stack.kinds) for position in positions}
    owner = [min(kept, key=lambda k: (kind[k] != kind[p], abs(k - p))) for p in range(stack.length)]
    return {k: tuple(p for p in range(stack.length) if owner[p] == k) for k in kept}


def gates_of(users: Mapping[int, Sequence[int]]) -> tuple[Gate, ...]:
    """A gate for every position that shares: 1 where the weights come from, else 0."""
    gates = {
        p: float(p == owner) for owner, positions in users.items() for p in positions if len(positions) > 1
    }
    return tuple(Gate(position=position, value=gates[position]) for position in sorted(gates))


def gated_to(stack: Stack, kept: Sequence[int], parts: Sequence[str]) -> StackPlan:
    """Every position, tied to the nearest kept one of its kind and gated: 1 where kept, else 0."""
    users = users_of(stack, kept)
    groups = (
        _group(positions=p, parts=parts, merge="pick", source=k) for k, p in users.items() if len(p) > 1
    )
    return StackPlan(
        name=stack.name, length=stack.length, groups=_having(stack, groups), gates=gates_of(users)
    )  # fmt: skip


def basis_over(
    stack: Stack,
    assignment: Sequence[int],
    parts: Sequence[str],
    rank: int,
    fit: Literal["svd", "geopair"] = "svd",
) -> StackPlan:
    """A shared basis of ``rank`` over the positions of each unique layer."""
    groups = (_positions(assignment, unique) for unique in dict.fromkeys(assignment))
    made = tuple(_group(positions=p, parts=parts, method="basis", rank=rank, fit=fit) for p in groups)
    return StackPlan(name=stack.name, length=stack.length, groups=_having(stack, made))


def atoms_over(stack: Stack, parts: Sequence[str], atoms: int) -> StackPlan:
    """Each matrix a mix of ``atoms`` shared ones, over all positions of a kind (MASA, 2508.04581); where there are no
    more positions than atoms, each keeps its own."""
    groups = (
        _group(positions=kind, parts=parts, method="atoms", atoms=atoms)
        for kind in stack.kinds
        if len(kind) > atoms
    )
    return StackPlan(name=stack.name, length=stack.length, groups=_having(stack, groups))
