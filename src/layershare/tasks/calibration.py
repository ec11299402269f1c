"""What models are shown to see what they do: some texts of the data, as batches."""

import random
from typing import TYPE_CHECKING, Any

from layershare.errors import DataError
from layershare.tasks.encoding import batches, usable_length
from layershare.tasks.task import Data, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

TEXTS = 256
LENGTH = 128


def encode_inputs(task: Task, tokenizer: Any, dataset: "Dataset", max_length: int, config: Any) -> "Dataset":
    """Rows of what a model with this config reads, cut at ``max_length`` tokens, or at fewer where it takes no more.

    There are ``labels`` among them only where the model reads them, so those of the data need not be the model's.
    """
    length = usable_length(tokenizer, config, max_length)
    known = task.self_supervised or "labels" in task.inputs
    return task.encode(tokenizer, dataset, length, config if known else None)


def sample_batches(
    task: Task,
    tokenizer: Any,
    data: Data,
    config: Any,
    *,
    labels: bool = False,
    texts: int = TEXTS,
    size: int = 32,
) -> "list[dict[str, Tensor]]":
    """Padded batches of ``size`` of ``texts`` texts to train on, longest first, for a model with this config.

    The texts are drawn at random, always the same: files are often sorted, and their first rows are of one kind.
    labels: also those of the data, where it has any. Raises DataError where there is no text.
    """
    from layershare.sharing.padding import told_apart  # torch is not needed to read results

    if data.train is None:
        raise DataError("There is no text to measure on.", "Give a file with some.")
    some = data.train.select(_drawn(len(data.train), texts))
    if labels:
        rows = task.encode(tokenizer, some, usable_length(tokenizer, config, LENGTH), config)
    else:
        rows = encode_inputs(task, tokenizer, some, LENGTH, config)
    rows = rows.select(_drawn(len(rows), texts))
    made = [batch for _, batch in batches(tokenizer, rows, size, task.collate, task.counts)]
    if not getattr(config, "is_encoder_decoder", False):
        return made
    return [told_apart(batch, getattr(tokenizer, "pad_token_id", None) or 0) for batch in made]


def _drawn(of: int, wanted: int) -> list[int]:
    return sorted(random.Random(0).sample(range(of), min(of, wanted)))
