"""Output matching: map a large model onto a small one with light modules, without labels."""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from layershare.adapt.trainable import fit
from layershare.errors import DataError, ModelError
from layershare.heal.cache import model_hash
from layershare.heal.fit import check_words
from layershare.tasks import Data, Task
from layershare.tasks.calibration import encode_inputs
from layershare.tasks.encoding import lengths
from layershare.train import TrainConfig


class MatchConfig(TrainConfig):
    """How to match outputs, or learn labels: the fields of :class:`~layershare.train.TrainConfig`, and some more."""

    max_length: int = Field(128, ge=4, description="Longer training texts are cut to this many tokens.")
    dropout: bool = Field(
        False, description="Whether the small model, with its modules, trains with dropout."
    )


def output_matching(small: Tensor, large: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1/2 * sum ||f_large(x) - f_small(x)||^2`` over the inputs x.

    Outputs are [..., d]; ``mask`` [...] says which of them count (None: all). Its gradient by ``small`` is ``small -
    large``, and nothing flows into ``large``.
    """
    difference = small - large.detach()
    if mask is not None:
        difference = difference[mask.bool()]
    return difference.square().sum() / 2


def match(
    model: Any,
    large: Any,
    tokenizer: Any,
    task: Task,
    data: Data,
    config: MatchConfig,
    out: str | Path,
    *,
    resume: bool = True,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Train the adapters of ``model`` (a PeftModel) in place until it answers as ``large`` does. Needs no labels.

    The answer is what the task gives: logits, or else the embedding. The loss is :func:`output_matching` divided by the
    number of texts of the batch, so that its size does not depend on it. Both models read the same token ids.

    Returns the history, see :func:`layershare.train.train`. Raises DataError without training texts, and ModelError
    when the vocabularies or the sizes of the outputs differ.
    """
    if data.train is None:
        raise DataError("There is no training data.", "Give a file with texts; labels are not needed.")
    check_words(model, large, tokenizer)
    dataset = encode_inputs(task, tokenizer, data.train, config.max_length, model.config)
    large.eval()

    def compute_loss(wrapped: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        wrapped.train(config.dropout)
        inputs = task.given(batch)
        with torch.no_grad():
            theirs = _answer(task.forward(large.to(next(iter(inputs.values())).device), inputs))
        outputs = task.forward(wrapped, inputs)
        ours = _answer(outputs)
        if ours.shape != theirs.shape:
            raise ModelError(
                f"The outputs differ in size: {list(ours.shape[1:])} here, {list(theirs.shape[1:])} in the large.",
                "Give models with the same labels, or embeddings of one width.",
            )
        return {"match": output_matching(ours, theirs, outputs.mask_of(outputs.along)) / len(ours)}

    def batch_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return task.collate(tokenizer, rows)

    made_of = {"teacher": model_hash(large)}
    return fit(
        model, dataset, batch_of, compute_loss, config, out, resume=resume, quiet=quiet, made_of=made_of,
        lengths=lengths(task.counts(dataset), dataset),
    )  # fmt: skip


def _answer(outputs: Any) -> Tensor:
    answers = (outputs.logits, outputs.embedding, outputs.values)
    return next(answer for answer in answers if answer is not None)
