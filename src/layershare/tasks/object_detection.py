"""Object detection: what is where in an image. Judged by mean average precision as pycocotools computes it (Lin et al.
2014, arXiv 1405.0312).

A row has an image, ``boxes`` [x, y, width, height] in pixels from the upper left corner, as COCO has them, and as many
``labels``; an image in which there is nothing has two empty lists. The loss is the model's own: it matches what it
found with what is there (Carion et al. 2020, arXiv 2005.12872). In distillation nothing needs to be matched: a student
that was made from its teacher asks the same queries, so each is compared with the same one of the teacher's, its
logits, and its box as far as the teacher sees a thing in it.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from layershare.config import Config
from layershare.errors import DataError
from layershare.tasks import classification, vision
from layershare.tasks.detections import average_precision, found_by
from layershare.tasks.files import label, number
from layershare.tasks.media import Medium
from layershare.tasks.reading import read_splits
from layershare.tasks.task import Data, Outputs, Task, no_texts, own_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

COLUMNS: dict[str, tuple[str, ...]] = vision.COLUMNS | {
    "boxes": ("objects.bbox", "objects.boxes", "bbox", "bboxes", "boxes"),
    "labels": (
        "objects.category", "objects.categories", "objects.label", "objects.labels", "objects.category_id",
        "category", "categories", "labels", "classes",
    ),
}  # fmt: skip
OPTIONAL = frozenset({"boxes", "labels"})
OVER = 1.0
"""So many pixels may a box stand out of its image, which annotations do by rounding; it is cut there."""


class Settings(Config):
    """How large the model sees an image."""

    size: tuple[int, int] | None = Field(
        None,
        description="[height, width] that every image is brought to; default: as the image processor says.",
    )


def sized(cell: Any, folder: Path) -> Medium:
    """An image that opens, with its ``width`` and ``height``, or ValueError."""
    found = vision.image(cell, folder)
    width, height = vision.pixels(found).size
    return {**found, "width": width, "height": height}  # type: ignore[typeddict-unknown-key]


def boxes(cell: Any) -> list[list[float]]:
    """A cell as boxes, or ValueError: four numbers each, the last two above 0."""
    try:
        cell = json.loads(cell) if isinstance(cell, str) else cell
        found = [[number(value) for value in box] for box in cell]
    except (TypeError, json.JSONDecodeError):
        raise ValueError("expected a list of boxes, [[x, y, width, height], ...]") from None
    for place, box in enumerate(found):
        if len(box) != 4:
            raise ValueError(f"box {place} has {len(box)} numbers, not 4 (x, y, width, height)")
        if min(box[2:]) <= 0:
            raise ValueError(f"box {place}, {cell[place]}, has a width or height that is not above 0")
    return found


def names(cell: Any) -> list[str]:
    """A cell as the label of each box, in order, or ValueError."""
    if not isinstance(cell, list):
        raise ValueError(f"expected a list of labels, found a {type(cell).__name__}")
    return [label(one) for one in cell]


def inside(image: Mapping[str, Any], found: Sequence[Sequence[float]]) -> None:
    """ValueError where a box stands out of its image."""
    width, height = image["width"], image["height"]
    for place, (x, y, wide, high) in enumerate(found):
        if min(x, y) < -OVER or x + wide > width + OVER or y + high > height + OVER:
            raise ValueError(
                f"box {place}, {[x, y, wide, high]}, is not inside of its image, which is {width} x {height}"
            )


read = partial(
    read_splits, candidates=COLUMNS, optional=OPTIONAL, folders=vision.folders,
    convert={"boxes": boxes, "labels": names}, beside={"image": sized}, equal=("boxes", "labels"),
    fits=("image", "boxes", inside), together={"boxes": "labels", "labels": "boxes"},
)  # fmt: skip
"""Reads images with boxes and their labels, or without any. Every image is opened, and kept nowhere."""


def encode(
    processor: Any,  # noqa: ARG001 - the same call for every task
    dataset: "Dataset",
    max_length: int,  # noqa: ARG001
    config: Any = None,
) -> "Dataset":
    """One row for each different image; given a model's config, and where the data has boxes, with ``labels``: for each
    box [id, centre x, centre y, width, height], the last four as fractions of the image."""
    keys = [one["sha256"] for one in dataset["image"]]
    first = list({key: place for place, key in reversed(list(enumerate(keys)))}.values())[::-1]
    rows = dataset.select(sorted(first))
    if config is None or "boxes" not in dataset.column_names:
        return rows.select_columns(["image"])
    labels = [
        [
            [float(i), *_fractions(box, image)]
            for i, box in zip(classification.label_ids(found, config), there, strict=True)
        ]
        for image, there, found in zip(rows["image"], rows["boxes"], rows["labels"], strict=True)
    ]
    return rows.select_columns(["image"]).add_column("labels", labels)


def _fractions(box: Sequence[float], image: Mapping[str, Any]) -> list[float]:
    """Centre, width and height of the part of a box that is in its image, as fractions of it."""
    (x, y, wide, high), width, height = box, image["width"], image["height"]
    left, right = max(0.0, x) / width, min(width, x + wide) / width
    top, bottom = max(0.0, y) / height, min(height, y + high) / height
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def collate(
    size: tuple[int, int] | None, processor: Any, rows: Sequence[Mapping[str, Any]]
) -> "dict[str, Any]":
    """``pixel_values`` [B, channels, height, width], and ``labels`` as models of this kind take them."""
    import torch

    how = {} if size is None else {"size": {"height": size[0], "width": size[1]}, "do_pad": False}
    batch: dict[str, Any] = vision.pixel_batch(processor, rows, **how)
    if "labels" in rows[0]:
        each = [torch.tensor(row["labels"]).reshape(-1, 5) for row in rows]
        batch["labels"] = [{"class_labels": one[:, 0].long(), "boxes": one[:, 1:]} for one in each]
    return batch


def check(data: Data, config: Any) -> None:
    """Labels that the model does not have raise DataError."""
    classification.label_ids(data.labels, config)


def head(data: Data) -> dict[str, Any]:
    """The keys of a config for a new head on this data."""
    if not data.labels:
        raise DataError("The data has no boxes to learn from.", "Give rows with boxes and their labels.")
    return {
        "id2label": dict(enumerate(data.labels)),
        "label2id": {name: i for i, name in enumerate(data.labels)},
    }


def forward(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """Logits of each of Q queries, [B, Q, classes + 1] where the last class is that there is nothing, or as yes-no
    questions [B, Q, classes, 2]; their boxes as values [B, Q, 4], which weigh as much as there is something."""
    import torch
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]

    out = model(**batch, output_hidden_states=hidden_states)
    if out.logits.shape[-1] > extract_model_from_parallel(model).config.num_labels:
        logits, something = out.logits, 1 - out.logits.softmax(-1)[..., -1]
    else:
        logits = torch.stack([torch.zeros_like(out.logits), out.logits], -1)
        something = out.logits.sigmoid().amax(-1)
    states, encoder = (), None
    if hidden_states:
        states = getattr(out, "hidden_states", None) or out.encoder_hidden_states
        if getattr(out, "decoder_hidden_states", None):
            encoder, states = len(states) - 1, states + out.decoder_hidden_states[1:]
    return Outputs(
        None, logits, states, None, encoder=encoder, values=out.pred_boxes, value_weights=something, loss=out.loss
    )  # fmt: skip


def metric_of(dataset: "Dataset") -> str:
    """``map`` where there are boxes, ``agreement`` otherwise."""
    return "map" if "boxes" in dataset.column_names else "agreement"


def configure(values: Mapping[str, Any]) -> Task:
    """The task with these :class:`Settings`."""
    settings = Settings.parse(values, where="object-detection")

    def evaluate(
        model: Any,
        processor: Any,
        dataset: "Dataset",
        *,
        batch_size: int = 32,
        max_length: int | None = None,  # noqa: ARG001 - as for every task
        teacher: Any = None,
    ) -> dict[str, float]:
        """``map`` (mean over IoU 0.5 to 0.95), ``map_50`` and ``map_75``, 0 to 1; with ``teacher`` also ``agreement``:
        ``map_50`` where what the teacher is sure of is taken for the truth."""
        if "boxes" not in dataset.column_names and teacher is None:
            raise DataError("The test data has no boxes.", "Give rows with boxes and their labels.")
        ours = found_by(task, model, processor, dataset, batch_size)
        figures = {}
        if "boxes" in dataset.column_names:
            true = [
                [
                    (i, 1.0, box)
                    for i, box in zip(classification.label_ids(said, model.config), there, strict=True)
                ]
                for said, there in zip(dataset["labels"], dataset["boxes"], strict=True)
            ]
            figures = average_precision(ours, true)
        if teacher is not None:
            theirs = ours if teacher is model else found_by(task, teacher, processor, dataset, batch_size)
            sure = [[one for one in each if one[1] >= 0.5] for each in theirs]
            figures["agreement"] = average_precision(ours, sure)["map_50"]
        return figures

    task = Task(
        name="object-detection",
        auto_class="AutoModelForObjectDetection",
        processor="AutoImageProcessor",
        unit="image",
        metric="map",
        higher_is_better=True,
        columns=COLUMNS,
        optional=OPTIONAL,
        read=read,
        encode=encode,
        texts=no_texts,
        check=check,
        forward=forward,
        evaluate=evaluate,
        metric_of=metric_of,
        inputs=vision.INPUTS,
        collate=partial(collate, settings.size),
        counts=vision.counts,
        loss=own_loss,
        terms=("logits", "labels", "values"),
        learns=True,
        head=head,
        fresh=vision.fresh_processor,
        configure=configure,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
    )
    return task


TASK = configure({})
