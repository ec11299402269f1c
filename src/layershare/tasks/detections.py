"""What a detector finds, and how good that is. Precision is computed by pycocotools: the reference that published
figures are made with, numpy alone, and no torchvision, which torchmetrics would need beside it."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from layershare.errors import DependencyError
from layershare.tasks.encoding import batches
from layershare.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

Found = list[tuple[int, float, Sequence[float]]]
"""Of one image: (label id, score 0 to 1, [x, y, width, height] in pixels)."""


def found_by(task: Task, model: Any, processor: Any, dataset: "Dataset", batch_size: int) -> list[Found]:
    """All that the model finds in each image, sure or not; no gradients, and the model's mode is left as it was."""
    import torch

    rows = dataset.select_columns(["image"])
    sizes = [(one["height"], one["width"]) for one in rows["image"]]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    result: list[Found] = [[] for _ in sizes]
    try:
        with torch.no_grad():
            for where, batch in batches(processor, rows, batch_size, task.collate, task.counts):
                out = task.forward(
                    model, {name: value.to(device) for name, value in task.given(batch).items()}
                )
                assert out.logits is not None
                assert out.values is not None
                raw = out.logits if out.logits.ndim == 3 else out.logits[..., 1]
                said = SimpleNamespace(logits=raw.float().cpu(), pred_boxes=out.values.float().cpu())
                told = processor.post_process_object_detection(
                    said, threshold=0.0, target_sizes=[sizes[i] for i in where]
                )
                for i, one in zip(where, told, strict=True):
                    corners = one["boxes"].tolist()
                    each = [[left, top, right - left, bottom - top] for left, top, right, bottom in corners]
                    result[i] = list(zip(one["labels"].tolist(), one["scores"].tolist(), each, strict=True))
    finally:
        model.train(was_training)
    return result


def average_precision(found: Sequence[Found], true: Sequence[Found]) -> dict[str, float]:
    """``map``, ``map_50`` and ``map_75``, 0 to 1, of what was found in each image; the scores of what is true do not
    matter. Labels that are true nowhere do not count; without any all are 0."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise DependencyError(
            "Average precision needs pycocotools.", "pip install 'layershare[vision]'"
        ) from None
    truth = _annotations(true)
    said = [one | {"score": score} for one, score in zip(_annotations(found), _scores(found), strict=True)]
    figures = dict.fromkeys(("map", "map_50", "map_75"), 0.0)
    if not truth or not said:
        return figures
    labels = sorted({one["category_id"] for one in [*truth, *said]})
    with redirect_stdout(io.StringIO()):  # it tells of each step
        known = COCO()
        known.dataset = {
            "images": [{"id": i} for i in range(len(true))],
            "annotations": truth,
            "categories": [{"id": i} for i in labels],
        }
        known.createIndex()
        judge = COCOeval(known, known.loadRes(said), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: float(value) for name, value in zip(figures, judge.stats, strict=False)}


def _annotations(images: Sequence[Found]) -> list[dict[str, Any]]:
    """As COCO has them; their numbers begin at 1, since 0 would be no match."""
    flat = [(i, one, list(box)) for i, each in enumerate(images) for one, _, box in each]
    return [
        {"id": n, "image_id": i, "category_id": one, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (i, one, box) in enumerate(flat, 1)
    ]


def _scores(images: Sequence[Found]) -> list[float]:
    return [score for each in images for _, score, _ in each]
