"""Rows of token ids -> batches to distil on."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layershare.heal.losses import IGNORED
from layershare.tasks.encoding import INPUTS, pad


class Collator:
    """Rows of token ids -> a padded batch with ``row`` [B], each token left out with chance ``augment``.

    What is left out follows from ``seed`` and the row's position in the run alone, so a resumed run leaves
    out the same. Special tokens stay, and so does at least one other token. ``labels``: one for each row of the
    dataset, given to the batch as ``label`` [B]; or a list of them, one for each token, as ``label`` [B, T].
    """

    def __init__(
        self, tokenizer: Any, augment: float = 0.0, seed: int = 0, labels: Sequence[Any] | None = None
    ) -> None:
        self._pad_with = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._augment = augment
        self._seed = seed
        self._labels = labels

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        kept = rows if not self._augment else [self._thinned(row) for row in rows]
        batch = {**pad(self._pad_with, kept), "row": torch.tensor([row["row"] for row in rows])}
        if self._labels is not None:
            batch["label"] = self._padded([self._labels[row["row"]] for row in rows])
        return batch

    @staticmethod
    def _padded(labels: list[Any]) -> Tensor:
        if isinstance(labels[0], int):
            return torch.tensor(labels)
        width = max(map(len, labels))
        return torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in labels])

    def _thinned(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        # Seeded by a text: torch's generator on the CPU looks at 32 bits of a seed only.
        rng = random.Random(f"{self._seed}/{row['position']}")
        draws = [2.0 if token in self._special else rng.random() for token in row["input_ids"]]
        kept = [i for i, draw in enumerate(draws) if draw >= self._augment]
        ordinary = [i for i, draw in enumerate(draws) if draw < 1]
        if ordinary and not set(kept) & set(ordinary):
            kept = sorted([*kept, max(ordinary, key=draws.__getitem__)])
        return {name: [row[name][i] for i in kept] for name in INPUTS if name in row}
