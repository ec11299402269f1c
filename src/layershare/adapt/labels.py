"""Training adapters and head on labelled texts."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layershare.adapt.matching import MatchConfig
from layershare.adapt.trainable import fit
from layershare.errors import DataError, OptionError
from layershare.tasks import Data, Task
from layershare.tasks.encoding import lengths, usable_length


def learn(
    model: Any,
    tokenizer: Any,
    task: Task,
    data: Data,
    config: MatchConfig,
    out: str | Path,
    *,
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
    length = usable_length(tokenizer, model.config, config.max_length)
    dataset = task.encode(tokenizer, data.train, length, model.config)

    def batch_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return task.collate(tokenizer, rows)

    def compute_loss(wrapped: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        wrapped.train(config.dropout)
        outputs = task.forward(wrapped, task.given(batch, learning=True))
        return {"labels": task.loss(outputs, batch.get("labels"))}

    long = lengths(task.counts(dataset), dataset)
    return fit(model, dataset, batch_of, compute_loss, config, out, resume=resume, quiet=quiet, lengths=long)


def check_labelled(task: Task) -> None:
    """OptionError for a task whose data has no labels."""
    if not task.learns:
        raise OptionError(
            f"the data of {task.name} has no labels to learn from.",
            "Give a teacher, whose outputs are matched instead.",
        )
