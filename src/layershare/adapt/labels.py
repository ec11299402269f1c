"""Training adapters and head on labelled texts."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layershare.adapt.trainable import fit
from layershare.errors import DataError, OptionError
from layershare.tasks import Data, Task
from layershare.tasks.encoding import usable_length
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
    """Train adapters and head of ``model`` (a PeftModel) in place by the task's loss of the labels of ``data.train``.

    Returns the history, see :func:`layershare.train.train`. Raises OptionError for a task whose data has no labels, and
    DataError for labels that the model does not know.
    """
    check_labelled(task)
    if data.train is None:
        raise DataError("There is no training data.", "Give a file with texts and labels.")
    length = usable_length(tokenizer, model.config, max_length)
    dataset = task.encode(tokenizer, data.train, length, model.config)

    def batch_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return task.collate(tokenizer, rows)

    def compute_loss(wrapped: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        wrapped.train()
        outputs = task.forward(wrapped, {name: batch[name] for name in task.inputs if name in batch})
        return {"labels": task.loss(outputs, batch["labels"])}

    return fit(model, dataset, batch_of, compute_loss, config, out, resume=resume, quiet=quiet)


def check_labelled(task: Task) -> None:
    """OptionError for a task whose data has no labels."""
    if not task.learns:
        raise OptionError(
            f"the data of {task.name} has no labels to learn from.",
            "Give a teacher, whose outputs are matched instead.",
        )
