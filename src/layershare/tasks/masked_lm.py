"""Masked language modelling (Devlin et al. 2018, arXiv 1810.04805). Judged by perplexity of the masked tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layershare.errors import ModelError, OptionError
from layershare.tasks.language import Guessing, Objective, Words, language_task
from layershare.tasks.masking import mask_tokens
from layershare.tasks.packing import framed, packed_dataset

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


def encode(
    tokenizer: Any,
    dataset: "Dataset",
    max_length: int,
    config: Any = None,  # noqa: ARG001 - the same call for every task
) -> "Dataset":
    """Packed blocks of ``max_length`` tokens, framed as one text, nothing masked yet."""
    return packed_dataset(tokenizer, dataset, framed(tokenizer), max_length)


def check(words: Words, size: int, guessing: Guessing) -> None:  # noqa: ARG001 - one signature
    """A tokenizer without a mask token cannot be masked with."""
    if words.mask is None:
        raise ModelError("The tokenizer has no mask token.", "Give another tokenizer, or --objective causal.")
    if guessing.separate:
        raise OptionError("separate is for causal models.", "Masked blocks are always seen as a whole.")


def batch(
    blocks: Sequence[Sequence[int]],
    draws: Sequence[np.random.Generator],
    words: Words,
    guessing: Guessing,
) -> "dict[str, Tensor]":
    """``input_ids`` with masks and ``labels``, both [B, T]."""
    import torch

    assert words.mask is not None
    masked = [
        mask_tokens(block, words.special, words.mask, draw, guessing.rate)
        for block, draw in zip(blocks, draws, strict=True)
    ]
    return {
        "input_ids": torch.tensor([ids for ids, _ in masked]),
        "labels": torch.tensor([labels for _, labels in masked]),
    }


TASK = language_task("masked-lm", "AutoModelForMaskedLM", encode, lambda: OBJECTIVE)
OBJECTIVE: Objective = Objective(TASK, "WordPiece", framed, check, batch)
