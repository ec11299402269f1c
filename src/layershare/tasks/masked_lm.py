"""Masked language modelling (Devlin et al. 2018, arXiv 1810.04805). Judged by perplexity of the masked tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layershare.errors import ModelError, OptionError
from layershare.tasks.corpus import COLUMNS
from layershare.tasks.language import (
    Guessing,
    Objective,
    Words,
    check_any,
    evaluator,
    forward_lm,
    perplexity,
    read_texts,
    texts_of,
)
from layershare.tasks.masking import mask_tokens
from layershare.tasks.packing import framed, packed_dataset
from layershare.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


def encode(tokenizer: Any, dataset: "Dataset", max_length: int) -> "Dataset":
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


TASK = Task(
    name="masked-lm",
    auto_class="AutoModelForMaskedLM",
    metric="perplexity",
    higher_is_better=False,
    columns=COLUMNS,
    optional=frozenset(),
    read=read_texts,
    encode=encode,
    texts=texts_of,
    check=check_any,
    forward=forward_lm,
    evaluate=evaluator(lambda: OBJECTIVE),
    metric_of=perplexity,
)
OBJECTIVE: Objective = Objective(TASK, "WordPiece", framed, check, batch)
