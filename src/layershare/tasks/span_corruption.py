"""Span corruption for encoder-decoders (T5; Raffel et al. 2019, arXiv 1910.10683). Judged by perplexity of the target.

It is asked as translation is: the spans that were left out are the ``labels``, and logits lie along them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layershare.errors import ModelError, OptionError
from layershare.tasks import seq2seq
from layershare.tasks.language import Guessing, Objective, Words, draws, language_task, words_of
from layershare.tasks.masking import corrupt_spans, noise_spans, spans_of
from layershare.tasks.packing import Frame, packed_dataset, separator_of

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


def frame(tokenizer: Any) -> Frame:
    """Nothing around a block: corruption ends input and target itself."""
    return Frame(separator=separator_of(tokenizer))


def encode(tokenizer: Any, dataset: "Dataset", max_length: int, config: Any = None) -> "Dataset":
    """Packed blocks of ``max_length`` tokens; given a config, corrupted, what was left out being the ``labels``."""
    from datasets import Dataset

    blocks = packed_dataset(tokenizer, dataset, frame(tokenizer), max_length)
    if config is None:
        return blocks
    words, guessing = words_of(tokenizer, config), Guessing()
    check(words, max_length, guessing)
    columns: dict[str, list[list[int]]] = {name: [] for name in seq2seq.INPUTS}
    for place, block in enumerate(blocks["input_ids"]):
        for name, value in batch([block], draws(0, [place]), words, guessing).items():
            columns[name].append(value[0].tolist())
    return Dataset.from_dict(columns)


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
    """``input_ids``, ``attention_mask`` [B, T] and ``labels`` [B, U]; equal blocks give equal lengths."""
    import torch

    assert words.end is not None
    pairs = []
    for block, draw in zip(blocks, draws, strict=True):
        noise = noise_spans(len(block), draw, guessing.rate, guessing.mean_span)
        pairs.append(corrupt_spans(block, noise, words.sentinels, words.end))
    left = torch.tensor([source for source, _ in pairs])
    labels = torch.tensor([target for _, target in pairs])
    return {"input_ids": left, "attention_mask": torch.ones_like(left), "labels": labels}


TASK = language_task(
    "span-corruption", "AutoModelForSeq2SeqLM", encode, lambda: OBJECTIVE,
    check=seq2seq.check, forward=seq2seq.forward, inputs=seq2seq.INPUTS, collate=seq2seq.collate, counts=seq2seq.counts,
)  # fmt: skip
OBJECTIVE: Objective = Objective(TASK, "byte-level BPE", frame, check, batch)
