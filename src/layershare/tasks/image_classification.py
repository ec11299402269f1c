"""Image classification: one label an image, several, or a number, see :mod:`layershare.tasks.classification`."""

from functools import partial
from typing import TYPE_CHECKING, Any

from layershare.tasks import classification, vision
from layershare.tasks.classification import answers, forward, head, metric_of
from layershare.tasks.task import Task, no_texts

if TYPE_CHECKING:
    from datasets import Dataset


OPTIONAL = frozenset({"labels", "score"})
read = partial(
    classification.read_answers,
    candidates=vision.COLUMNS,
    optional=OPTIONAL,
    beside={"image": vision.image},
    folders=vision.folders,
)
"""Reads images with their labels: a table with a column of paths, or a folder ``LABEL/IMAGE``. Every image is opened
once, and kept nowhere."""


def encode(
    processor: Any,  # noqa: ARG001 - the same call for every task
    dataset: "Dataset",
    max_length: int,  # noqa: ARG001
    config: Any = None,
) -> "Dataset":
    """One row for each different image; given a model's config, and where the data has them, with ``labels``."""
    return classification.different(dataset, "image", config)


def predict(
    model: Any,
    processor: Any,
    dataset: "Dataset",
    *,
    batch_size: int = 64,
    max_length: int | None = None,  # noqa: ARG001
) -> list[Any]:
    """What the model says of each row, in the form of :func:`~layershare.tasks.classification.truth`."""
    return answers(TASK, model, processor, dataset.select_columns(["image"]), batch_size=batch_size)


evaluate = classification.evaluator(predict)

TASK = Task(
    name="image-classification",
    auto_class="AutoModelForImageClassification",
    processor="AutoImageProcessor",
    unit="image",
    metric="accuracy",
    higher_is_better=True,
    columns=vision.COLUMNS | classification.COLUMNS,
    optional=OPTIONAL,
    read=read,
    encode=encode,
    texts=no_texts,
    check=classification.check,
    forward=forward,
    evaluate=evaluate,
    metric_of=metric_of,
    inputs=vision.INPUTS,
    collate=vision.collate,
    counts=vision.counts,
    learns=True,
    head=head,
    fresh=vision.fresh_processor,
)
