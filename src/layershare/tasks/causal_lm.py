"""Causal language modelling: each token from those before it (Radford et al. 2019). Judged by perplexity.

With ``separate`` a document does not see the ones before it in its block: positions count anew from each separator,
which transformers reads as packed sequences and masks accordingly. The first token of a document is then not asked for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layershare.tasks.language import Guessing, Objective, Words, language_task
from layershare.tasks.masking import IGNORED
from layershare.tasks.packing import Frame, framed, packed_dataset, separator_of

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


def frame(tokenizer: Any) -> Frame:
    """In front of a block what the tokenizer begins a text with, if anything (Gemma says nothing of sense without it);
    documents end with the end-of-text token."""
    return Frame(prefix=framed(tokenizer).prefix, separator=separator_of(tokenizer))


def encode(
    tokenizer: Any,
    dataset: "Dataset",
    max_length: int,
    config: Any = None,  # noqa: ARG001 - the same call for every task
) -> "Dataset":
    """Packed blocks of ``max_length`` tokens, not one row a text."""
    return packed_dataset(tokenizer, dataset, frame(tokenizer), max_length)


def check(words: Words, size: int, guessing: Guessing) -> None:
    """Every tokenizer with a separator will do."""


def batch(
    blocks: Sequence[Sequence[int]],
    draws: Sequence[np.random.Generator],  # noqa: ARG001 - nothing is drawn
    words: Words,
    guessing: Guessing,
) -> "dict[str, Tensor]":
    """``input_ids`` and ``labels`` [B, T]: at each place the next token."""
    import torch

    ids = np.asarray(blocks, dtype=np.int64)
    labels = np.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    if not guessing.separate:
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    ends = ids == words.separator
    labels[ends] = IGNORED
    places = np.arange(ids.shape[1])
    starts = np.zeros_like(ids)
    starts[:, 1:] = np.where(ends[:, :-1], places[1:], 0)
    positions = places - np.maximum.accumulate(starts, axis=1)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
    }


TASK = language_task("causal-lm", "AutoModelForCausalLM", encode, lambda: OBJECTIVE)
OBJECTIVE: Objective = Objective(TASK, "byte-level BPE", frame, check, batch)
