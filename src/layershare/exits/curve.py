"""Accuracy against time: where texts leave for every threshold, and which threshold keeps the quality."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layershare.exits.head import confidence
from layershare.exits.model import EarlyExit
from layershare.measure.latency import no_garbage_collection, quantile

NEVER = 1.01
"""A threshold that no probability reaches."""
CANDIDATES, POINTS = 512, 12
"""Thresholds that are tried, and that are told."""


@dataclass(frozen=True)
class Answers:
    """``logits`` [E + 1, N, classes] of N texts at each exit and at the end; ``positions`` behind which these are."""

    logits: Tensor
    positions: tuple[int, ...]

    def taken(self, threshold: float) -> Tensor:
        """The number of the exit (E: the end) at which each text leaves [N]."""
        sure = confidence(self.logits) >= threshold
        sure[-1] = True
        return sure.int().argmax(0)

    def said(self, threshold: float) -> list[int]:
        """The class of each text."""
        taken = self.taken(threshold)
        return self.logits[taken, torch.arange(len(taken))].argmax(-1).tolist()

    def layers(self, threshold: float) -> float:
        """The layers that run, the mean over the texts."""
        return float(torch.tensor(self.positions)[self.taken(threshold)].double().mean()) + 1

    def thresholds(self, count: int) -> list[float]:
        """Quantiles of what the exits are sure of, ascending and different."""
        found = confidence(self.logits[:-1]).double().flatten().quantile(torch.linspace(0, 1, count).double())
        return sorted(set(found.tolist()))


def choose(held: Answers, score: Callable[[list[int]], float], max_loss: float) -> float:
    """The least threshold that keeps ``1 - max_loss`` of the score in full depth; NEVER if none does.

    ``score``: classes of the texts -> the metric, higher is better.
    """
    bar = (1 - max_loss) * score(held.said(NEVER))
    kept = (one for one in held.thresholds(CANDIDATES) if score(held.said(one)) >= bar)
    return next(kept, NEVER)


def times(
    model: EarlyExit,
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Milliseconds that each text takes to every exit, to the end through all exits, and last without any exit.

    The heads on the way run. All ways of a text take turns; the median of ``repeats`` is taken. inputs: one text each.
    """
    ways: list[Callable[[Mapping[str, Tensor]], Any]] = [_way(model, p) for p in (*model.positions, None)]
    ways.append(lambda batch: model.model(**batch))
    found = []
    with torch.no_grad(), no_garbage_collection():
        for batch in inputs:
            taken: list[list[float]] = [[] for _ in ways]
            for repeat in range(repeats + 1):
                for way, spent in zip(ways, taken, strict=True):
                    start = clock()
                    way(batch)
                    if repeat:  # the first is for the caches
                        spent.append(1000 * (clock() - start))
            found.append([quantile(spent, 0.5) for spent in taken])
    return found


def _way(model: EarlyExit, position: int | None) -> Callable[[Mapping[str, Tensor]], Any]:
    """Run to one exit, whatever it says; None: to the end."""
    forced = {p: 0.0 if p == position else NEVER for p in model.positions}

    def run(batch: Mapping[str, Tensor]) -> Any:
        before, model.threshold = model.threshold, forced
        try:
            return model(**batch)
        finally:
            model.threshold = before

    return run


def point(
    threshold: float,
    tested: Answers,
    score: Callable[[list[int]], float],
    timed: Answers,
    taken_ms: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """One point of the curve.

    ``tested``, ``score``: the texts that quality and layers are told of. ``timed``, ``taken_ms``: those that were
    timed, see :func:`times`.
    """
    spent = [row[way] for row, way in zip(taken_ms, timed.taken(threshold).tolist(), strict=True)]
    full = [row[-1] for row in taken_ms]
    counts = torch.bincount(tested.taken(threshold), minlength=len(tested.positions)).tolist()
    return {
        "threshold": threshold,
        "quality": score(tested.said(threshold)),
        "layers": tested.layers(threshold),
        "leave": dict(zip(map(str, tested.positions), counts, strict=True)),
        "p50_ms": quantile(spent, 0.5),
        "p95_ms": quantile(spent, 0.95),
        "mean_ms": sum(spent) / len(spent),
        "times_as_fast": sum(full) / sum(spent),
    }
