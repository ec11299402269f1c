"""Rows of a data set -> batches to train on."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layershare.tasks.encoding import INPUTS, pad


class Collator:
    """Rows -> a batch as ``collate`` makes it, with ``row`` and ``position`` [B], each token left out
    with chance ``augment``.

    What is left out follows from ``seed`` and the row's position in the run alone, so a resumed run leaves
    out the same. Special tokens stay, and so does at least one other token.
    """

    def __init__(
        self,
        tokenizer: Any,
        augment: float = 0.0,
        seed: int = 0,
        collate: Callable[[Any, Sequence[Mapping[str, Any]]], dict[str, Tensor]] = pad,
    ) -> None:
        self._tokenizer = tokenizer
        self._collate = collate
        self._augment = augment
        self._seed = seed
        self._special = frozenset(tokenizer.all_special_ids) if augment else frozenset()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        kept = rows if not self._augment else [self._thinned(row) for row in rows]
        numbers = {name: torch.tensor([row[name] for row in rows]) for name in ("row", "position")}
        return {**self._collate(self._tokenizer, kept), **numbers}

    def _thinned(self, row: Mapping[str, Any]) -> dict[str, Any]:
        # Seeded by a text: torch's generator on the CPU looks at 32 bits of a seed only.
        rng = random.Random(f"{self._seed}/{row['position']}")
        draws = [2.0 if token in self._special else rng.random() for token in row["input_ids"]]
        kept = [i for i, draw in enumerate(draws) if draw >= self._augment]
        ordinary = [i for i, draw in enumerate(draws) if draw < 1]
        if ordinary and not set(kept) & set(ordinary):
            kept = sorted([*kept, max(ordinary, key=draws.__getitem__)])
        return {**row, **{name: [row[name][i] for i in kept] for name in INPUTS if name in row}}
