"""What a search may choose, and the trials that every search begins with. Knows no torch and no optuna.

A choice says who shares with whom and by which method, and bends the measure that ranks are spent by. The ranks
themselves follow from the budget (:mod:`layershare.search.planner`), so every choice spends all of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol

Positions = Sequence[int]
Split = list[tuple[int, ...]]


def _runs(size: int) -> Callable[[Positions], Split]:
    return lambda positions: [
        tuple(positions[start : start + size]) for start in range(0, len(positions), size)
    ]


def _cycle(positions: Positions) -> Split:
    step = -(-len(positions) // 2)
    return [tuple(positions[start::step]) for start in range(step)]


def _middle(positions: Positions) -> Split:
    ends: Split = [(positions[0],), (positions[-1],)] if len(positions) > 1 else [(positions[0],)]
    between = tuple(positions[1:-1])
    return [*ends, between] if between else ends


# Positions, in order, to groups of them.
GROUPINGS: dict[str, Callable[[Positions], Split]] = {
    "alone": _runs(1),
    "pairs": _runs(2),
    "triples": _runs(3),
    "cycle": _cycle,
    "middle": _middle,
    "all": lambda positions: [tuple(positions)],
}
# How a group shares: a basis on one side, or a tie with private corrections.
METHODS = ("input", "output", "regmean", "mean")
GATES = (0.25, 0.5, 0.75)
BEND = 2.0
"""The most by which a kind of matrix is favoured, as a power of two."""


class Suggest(Protocol):
    """What is asked for each number: a trial of optuna."""

    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_float(self, name: str, low: float, high: float) -> float: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Space:
    """What there is to choose from, on one model and budget."""

    parts: tuple[str, ...]
    kinds: tuple[str, ...]
    """Kinds of matrices, by name without numbers; or the parts, where there are many."""
    most_dropped: int
    tables: tuple[float, ...] = (1.0,)
    """Widths of the embedding table, as fractions of its own; 1: it stays whole."""


@dataclass(frozen=True)
class Choice:
    """One point of the space. The default is what ``auto`` does, nothing dropped."""

    dropped: int = 0
    """Positions dropped, those missed least first."""
    gated: int = 0
    """The next ones in that order: kept as users of their neighbours' weights, behind a gate of ``gate``."""
    gate: float = 0.5
    groups: Mapping[str, str] = field(default_factory=dict)
    """By part."""
    methods: Mapping[str, str] = field(default_factory=dict)
    favours: Mapping[str, float] = field(default_factory=dict)
    """By kind of matrix: the power of two by which its errors count more."""
    depth: float = 0.0
    """As ``favours``, from -depth at the first position to +depth at the last."""
    power: float = 1.0
    """Errors count by this power: below 1 ranks are more even."""
    table: float = 1.0

    def __str__(self) -> str:
        said = [f"{self.dropped} dropped"] * bool(self.dropped)
        said += [f"{self.gated} gated at {self.gate:g}"] * bool(self.gated)
        said += [
            f"{part} in {grouping if grouping == 'pairs' else grouping + ' groups'} ({self.methods[part]})"
            for part, grouping in self.groups.items()
            if grouping != "alone" and not self.gated
        ]
        said += [f"table at {self.table:g}"] * (self.table < 1)
        bent = {k: v for k, v in [*self.favours.items(), ("depth", self.depth)] if abs(v) >= 0.5}
        said += [f"{name} x {2**value:.2g}" for name, value in bent.items()]
        said += [f"power {self.power:.2f}"] * (abs(self.power - 1) >= 0.05)
        return ", ".join(said) or "every position its own factors"


def suggest(space: Space, trial: Suggest) -> Choice:
    """One choice; every number is asked for, in the same order each time."""
    return Choice(
        dropped=trial.suggest_int("dropped", 0, space.most_dropped),
        gated=trial.suggest_int("gated", 0, min(2, space.most_dropped)),
        gate=trial.suggest_categorical("gate", GATES),
        groups={
            part: trial.suggest_categorical(f"groups of {part}", tuple(GROUPINGS)) for part in space.parts
        },
        methods={part: trial.suggest_categorical(f"method of {part}", METHODS) for part in space.parts},
        favours={kind: trial.suggest_float(f"favour {kind}", -BEND, BEND) for kind in space.kinds},
        depth=trial.suggest_float("favour depth", -BEND, BEND),
        power=trial.suggest_float("power", 0.5, 1.5),
        table=trial.suggest_categorical("table", space.tables),
    )


class Near:
    """Answers near to those of another point: numbers move a little, one in ten names changes."""

    def __init__(self, point: Mapping[str, Any], draw: Random, step: float) -> None:
        """step: the standard deviation of a move, as a part of the range."""
        self.point, self.draw, self.step = point, draw, step

    def suggest_float(self, name: str, low: float, high: float) -> float:
        return min(max(self.draw.gauss(self.point[name], self.step * (high - low)), low), high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        move = self.draw.choice((-1, 1)) if self.draw.random() < 0.1 else 0
        return min(max(self.point[name] + move, low), high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.draw.choice(choices) if self.draw.random() < 0.1 else self.point[name]


def begin_with(space: Space) -> Iterator[tuple[str, Choice]]:
    """The choices that every search tries first, by name: each differs in one thing from ``auto``."""
    base = Choice(
        groups=dict.fromkeys(space.parts, "alone"),
        methods=dict.fromkeys(space.parts, METHODS[0]),
        favours=dict.fromkeys(space.kinds, 0.0),
    )
    yield "own factors", base
    for number in range(1, min(3, space.most_dropped) + 1):
        yield f"{number} dropped", replace(base, dropped=number)
    if space.most_dropped:
        yield "1 gated", replace(base, gated=1)
    for part in space.parts:
        shared = replace(base, groups=base.groups | {part: "pairs"})  # type: ignore[operator]
        yield f"{part} in pairs, one input side", shared
        yield (
            f"{part} tied in pairs",
            replace(shared, methods=base.methods | {part: "regmean"}),  # type: ignore[operator]
        )
    yield "more even ranks", replace(base, power=0.75)
    for width in space.tables:
        if width < 1:
            yield f"table at {width:g}", replace(base, table=width)


def as_parameters(choice: Choice) -> dict[str, Any]:
    """The choice under the names that :func:`suggest` asks for."""
    return {
        "dropped": choice.dropped, "gated": choice.gated, "gate": choice.gate,
        **{f"groups of {part}": name for part, name in choice.groups.items()},
        **{f"method of {part}": name for part, name in choice.methods.items()},
        **{f"favour {kind}": value for kind, value in choice.favours.items()},
        "favour depth": choice.depth, "power": choice.power, "table": choice.table,
    }  # fmt: skip
