"""Training adapters and head on labelled texts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layershare.adapt.trainable import fit
from layershare.errors import DataError, OptionError
from layershare.tasks import Data, Task
from layershare.tasks.encoding import INPUTS, encode, pad, usable_length
from layershare.tasks.text_classification import label_ids
from layershare.train import TrainConfig


def learn(
    model: Any,
    tokenizer: Any,
    task: Task,
    data: Data,
    config: TrainConfig,
    out: str | Path,
    *,
    max_length: int = 128,
    resume: bool = True,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Train adapters and head of ``model`` (a PeftModel) in place by the cross-entropy of the labels of ``data.train``.

    Returns the history, see :func:`layershare.train.train`. Raises OptionError for a task whose data has no labels, and
    DataError for labels that the model does not know.
    """
    from datasets import Dataset

    if "label" not in task.columns:
        raise OptionError(
            f"the data of {task.name} has no labels to learn from.",
            "Give a teacher, whose outputs are matched instead.",
        )
    if data.train is None:
        raise DataError("There is no training data.", "Give a file with texts and labels.")
    rows = data.train
    second = rows["text_pair"][:] if "text_pair" in rows.column_names else None
    encoded = encode(tokenizer, rows["text"][:], usable_length(tokenizer, model.config, max_length), second)
    dataset = Dataset.from_dict({**encoded, "label": label_ids(rows["label"][:], model.config)})

    def batch_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**pad(tokenizer, rows), "label": torch.tensor([row["label"] for row in rows])}

    def compute_loss(wrapped: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        wrapped.train()
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        logits = task.forward(wrapped, inputs).logits
        assert logits is not None
        return {"labels": nn.functional.cross_entropy(logits, batch["label"])}

    return fit(model, dataset, batch_of, compute_loss, config, out, resume=resume, quiet=quiet)
