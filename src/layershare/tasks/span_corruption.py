"""Span corruption for encoder-decoders (T5; Raffel et al. 2019, arXiv 1910.10683). Judged by perplexity of the target.

Not listed in ``TASKS``: it is an objective of ``pretrain``, and what such a model is for has tasks of its own.
"""

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
from layershare.tasks.masking import corrupt_spans, noise_spans, spans_of
from layershare.tasks.packing import Frame, packed_dataset, separator_of
from layershare.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


def frame(tokenizer: Any) -> Frame:
    """Nothing around a block: corruption ends input and target itself."""
    return Frame(separator=separator_of(tokenizer))


def encode(tokenizer: Any, dataset: "Dataset", max_length: int) -> "Dataset":
    """Packed blocks of ``max_length`` tokens, not corrupted yet."""
    return packed_dataset(tokenizer, dataset, frame(tokenizer), max_length)


def check(words: Words, size: int, guessing: Guessing) -> None:
    """There must be a sentinel for every span, and a token for the decoder to start with."""
    needed = spans_of(size, guessing.rate, guessing.mean_span)
    if len(words.sentinels) < needed:
        raise ModelError(
            f"Blocks of {size} tokens need {needed} sentinels, the tokenizer has {len(words.sentinels)} "
            "(<extra_id_0>, <extra_id_1>, ...).",
            "Take smaller blocks, longer spans, or a tokenizer that is made for it.",
        )
    if words.end is None or words.start is None:
        raise ModelError("The model has no token to end a text, or none to start its decoder with.")
    if guessing.separate:
        raise OptionError("separate is for causal models.", "Corrupted blocks are always seen as a whole.")


def batch(
    blocks: Sequence[Sequence[int]],
    draws: Sequence[np.random.Generator],
    words: Words,
    guessing: Guessing,
) -> "dict[str, Tensor]":
    """``input_ids`` [B, T], ``decoder_input_ids`` and ``labels`` [B, U]; equal blocks give equal lengths."""
    import torch

    assert words.end is not None
    pairs = []
    for block, draw in zip(blocks, draws, strict=True):
        noise = noise_spans(len(block), draw, guessing.rate, guessing.mean_span)
        pairs.append(corrupt_spans(block, noise, words.sentinels, words.end))
    return {
        "input_ids": torch.tensor([left for left, _ in pairs]),
        "decoder_input_ids": torch.tensor([[words.start, *target[:-1]] for _, target in pairs]),
        "labels": torch.tensor([target for _, target in pairs]),
    }


TASK = Task(
    name="span-corruption",
    auto_class="AutoModelForSeq2SeqLM",
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
OBJECTIVE: Objective = Objective(TASK, "byte-level BPE", frame, check, batch)
