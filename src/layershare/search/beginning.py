"""What every search tries first: each preset at the budget, ``auto``, and simple variations of it."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

from layershare.errors import LayershareError, ModelError, PlanError
from layershare.plan import SharingPlan
from layershare.search.bench import Bench
from layershare.search.budget import for_layers, most_for_layers, table_at, widths
from layershare.search.planner import plan_of_choice, space_of
from layershare.search.space import Choice, Space, begin_with
from layershare.sharing.make import SCHEMES, make_plan
from layershare.sharing.search import SEARCHED, Place, least_missed
from layershare.stacks import Stack, find_stacks

MOST_DROPPED = 8
"""Positions that may be dropped or gated, at most: finding the order takes a pass for each position left, each time."""


class Entry(NamedTuple):
    """A trial to be run: what it is called, and its plan, or why there is none."""

    name: str
    plan: SharingPlan | None
    choice: Choice | None = None
    refused: str = ""


def entry(name: str, make: Callable[[], SharingPlan], choice: Choice | None = None) -> Entry:
    """The entry of the plan that ``make`` makes."""
    try:
        return Entry(name, make(), choice)
    except LayershareError as error:
        return Entry(name, None, choice, error.message)


class Beginning:
    """One model and budget: its space, and how choices become plans. Of what costs time, nothing is done twice."""

    def __init__(self, bench: Bench, budget: float) -> None:
        self.bench, self.budget = bench, budget
        self.stacks: tuple[Stack, ...] = tuple(s for s in find_stacks(bench.model) if not s.tied)
        if not self.stacks:
            raise PlanError(f"{type(bench.model).__name__} is shared already.", "Give the original.")
        self._order: list[Place] | None = None
        self._missed = cache(lambda gone: least_missed(bench.model, self.stacks, gone, bench.change))

    @property
    def order(self) -> list[Place]:
        """Positions by what they are missed, the least first (see ``auto``); so many as the budget may ask to drop."""
        if self._order is None:
            layers = sum(stack.length for stack in self.stacks)
            most = min(int((1 - most_for_layers(self.bench.model, self.budget)) * layers), MOST_DROPPED)
            self._order = []
            try:
                while len(self._order) < most and (place := self._missed(tuple(self._order))) is not None:
                    self._order.append(place)
            except ModelError:  # its layers cannot be skipped
                self._order = []
        return self._order

    @property
    def space(self) -> Space:
        return space_of(self.stacks, self.order, widths(self.budget))

    def propose(self, choice: Choice) -> SharingPlan:
        """The plan of a choice. Raises PlanError, or ModelError, where there is none."""
        model, tables = self.bench.model, table_at(self.bench.model, choice.table)
        made = plan_of_choice(
            self.stacks, choice, for_layers(model, self.budget, tables), self.bench.fitted, self.order
        )
        return made.model_copy(update={"tables": tables})

    def entries(self) -> list[Entry]:
        """The first trials."""
        variations = (
            entry(name, partial(self.propose, choice), choice) for name, choice in begin_with(self.space)
        )
        return [
            *_merged(self._presets()),
            self._measured("d_rank"),
            self._measured("auto", missed=self._missed),
            *variations,
        ]

    def _measured(self, scheme: str, **options: Any) -> Entry:
        def make() -> SharingPlan:
            bench = self.bench
            left = for_layers(bench.model, self.budget)
            if left >= 1:
                raise PlanError("the model is within the budget as it is.")
            return SEARCHED[scheme](
                bench.model, self.stacks, left, lambda: bench.change, lambda: bench.moments, **options
            )

        return entry(scheme, make)

    def _presets(self) -> Iterator[Entry]:
        for preset in SCHEMES:
            yield entry(preset, partial(self._preset, preset))
            if preset not in ("drop", "gated", "basis", "geopair", "atoms"):
                yield entry(f"{preset}, regmean", partial(self._preset, preset, merge="regmean"))

    def _preset(self, preset: str, **options: Any) -> SharingPlan:
        left = for_layers(self.bench.model, self.budget)
        if left >= 1:
            raise PlanError("the model is within the budget as it is.")
        return make_plan(self.stacks, preset, budget=left, **options)


def _merged(entries: Iterable[Entry]) -> list[Entry]:
    """Equal plans once, under all their names."""
    found: dict[str, Entry] = {}
    for one in entries:
        key = one.refused if one.plan is None else one.plan.to_json()
        old = found.get(key)
        found[key] = one if old is None else old._replace(name=f"{old.name} / {one.name}")
    return list(found.values())
