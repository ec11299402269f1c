"""Which positions guess: measured on text, by how often they say what the whole model says, and what that costs."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from layershare.decoding.view import draft_view, only_stack
from layershare.errors import DataError, ModelError
from layershare.measure.latency import quantile


@dataclass(frozen=True)
class Draft:
    """``positions`` that guess, ``tokens`` a round. ``agreement``: how often they say what the whole model says.

    ``times_as_fast`` is predicted: what a round gives over what it takes, in steps of the whole model. 1 or less: a
    draft is not worth it.
    """

    positions: tuple[int, ...]
    tokens: int
    agreement: float
    times_as_fast: float


def choose_draft(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    most_tokens: int = 8,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Draft, ...]:
    """Take positions away one by one, each time the one that is missed least, and price every draft on the way.

    Args:
        model: a decoder in evaluation mode.
        batches: texts to measure on, as ``model(**batch)`` takes them (``input_ids``, ``attention_mask``), best the
            kind that will be written.
        most_tokens: guesses a round, at most.
        clock: seconds; ``time.thread_time`` leaves out waiting for a busy machine, with one thread.

    Returns:
        Drafts, the one that promises most first.

    Raises DataError without texts, ModelError for what cannot be drafted for.
    """
    texts = list(batches)
    if not texts:
        raise DataError("There is no text to choose a draft on.")
    length = only_stack(model.eval()).length
    if length < 2:
        raise ModelError(f"{type(model).__name__} has a single layer: nothing can be left out.")
    whole = [_said(model, batch) for batch in texts]

    def agreement(positions: tuple[int, ...]) -> float:
        view = draft_view(model, positions)
        same = [
            (_said(view, batch) == said)[_counted(batch)] for batch, said in zip(texts, whole, strict=True)
        ]
        return float(torch.cat(same).double().mean())

    kept, found = tuple(range(length)), []
    step, more, layer = _costs(model, length, most_tokens, clock)
    while len(kept) > 1:
        trials = [tuple(p for p in kept if p != gone) for gone in kept]
        agreed, kept = max((agreement(trial), trial) for trial in trials)
        cost = 1 - layer * (length - len(kept)) / step
        priced = [
            Draft(kept, tokens, agreed, promise(agreed, tokens, cost, 1 + more * tokens / step))
            for tokens in range(1, most_tokens + 1)
        ]
        found.append(max(priced, key=lambda draft: draft.times_as_fast))
    return tuple(sorted(found, key=lambda draft: -draft.times_as_fast))


def promise(agreement: float, tokens: int, draft_cost: float, check_cost: float) -> float:
    """Tokens that a round is expected to give, over its cost in steps of the whole model (Leviathan et al., 2022,
    arXiv 2211.17192, with guesses that are right independently of each other).

    >>> promise(0.5, 1, 0.25, 1.0)
    1.2
    """
    given = sum(agreement**i for i in range(tokens + 1))
    return given / (tokens * draft_cost + check_cost)


@torch.inference_mode()
def _said(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch, use_cache=False).logits.argmax(-1)


def _counted(batch: Mapping[str, Any]) -> Tensor:
    """Where the text is real, and something stands before the next token."""
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).bool()


@torch.inference_mode()
def _costs(model: Any, length: int, tokens: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds of a step of the whole model, of each further token in it, and of one layer in a step."""
    single = draft_view(model, (0,))

    def run(one: Any, count: int) -> Callable[[], float]:
        cache = DynamicCache(config=one.config)
        cache.activate_past_recording()
        ids = torch.zeros(1, 16, dtype=torch.long, device=model.device)
        one(input_ids=ids, past_key_values=cache, use_cache=True)

        def once() -> float:
            began = clock()
            one(input_ids=ids[:, :count], past_key_values=cache, use_cache=True)
            spent = clock() - began
            cache.crop(-count)
            return spent

        return once

    ways = {"step": run(model, 1), "more": run(model, 1 + tokens), "single": run(single, 1)}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(12):
        for name, way in ways.items():
            spent = way()
            if repeat > 1:
                taken[name].append(spent)
    step, more, single_step = (quantile(taken[name], 0.5) for name in ("step", "more", "single"))
    layer = max(0.0, (step - single_step) / (length - 1))
    return step, max(0.0, (more - step) / tokens), layer
