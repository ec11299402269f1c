"""Images: from files to pixels. Needs Pillow, nothing else; a model's image processor does the rest, on numpy."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layershare.errors import DataError, DependencyError, ModelError
from layershare.tasks.media import Medium, folder_tables, medium, stream

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image", "file_name", "path", "file", "filename", "img", "image_path", "picture", "photo"),
}
INPUTS = ("pixel_values",)


def image(cell: Any, folder: Path) -> Medium:
    """A cell of a table in ``folder`` as an image that opens to its last pixel, or ValueError."""
    opener = _pillow()
    return medium(cell, folder, lambda raw: opener.open(raw).load(), "an image")


folders = partial(folder_tables, role="image", suffixes=SUFFIXES)
"""How a folder of images is read, see :func:`~layershare.tasks.media.folder_tables`."""


def pixels(one: Medium) -> Any:
    """The image, upright and in RGB. Raises DataError if its file is gone."""
    from PIL import ImageOps

    opened = _pillow().open(stream(one))
    return ImageOps.exif_transpose(opened).convert("RGB")


def collate(processor: Any, rows: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
    """Rows with an ``image``, and ``labels`` where they have any -> ``pixel_values`` [B, channels, height, width]."""
    import torch

    batch = pixel_batch(processor, rows)
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def pixel_batch(processor: Any, rows: Sequence[Mapping[str, Any]], **how: Any) -> "dict[str, Tensor]":
    """The ``pixel_values`` alone. ``how``: for the image processor."""
    import torch

    # One by one: a processor may pad images of a batch to each other, and then what a model says of one depends on all.
    each = [
        processor(images=[pixels(row["image"])], return_tensors="pt", **how)["pixel_values"] for row in rows
    ]
    if odd := next((i for i, one in enumerate(each) if one.shape != each[0].shape), None):
        raise DataError(
            f"{rows[odd]['image']['path'] or 'An image'} becomes {list(each[odd].shape[1:])} pixels, the others "
            f"{list(each[0].shape[1:])}.",
            "Set the image processor to one size, in preprocessor_config.json beside the model.",
        )
    return {"pixel_values": torch.cat(each)}


def counts(rows: Any, config: Any = None) -> dict[Any, list[int]]:  # noqa: ARG001 - as for every task
    """Nothing: all images become equally many patches."""
    return {}


def fresh_processor(config: Any) -> Any:
    """The image processor of a model that is made from this config alone: its type's own, to the config's size."""
    from transformers.models.auto.image_processing_auto import (
        IMAGE_PROCESSOR_MAPPING_NAMES,
        get_image_processor_class_from_name,
    )

    _pillow()
    # Of a model that also reads or writes texts, the part that sees.
    sees = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    known = (IMAGE_PROCESSOR_MAPPING_NAMES.get(one.model_type, {}) for one in (config, sees))
    name = next((names["pil"] for names in known if "pil" in names), None)
    if name is None:
        raise ModelError(
            f"transformers has no image processor for {config.model_type} that needs only Pillow."
        )
    made: Any = get_image_processor_class_from_name(name)()
    size = getattr(sees, "image_size", None)
    if size is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        made.size = {"height": height, "width": width}
        if getattr(made, "do_center_crop", False):
            made.do_center_crop = False  # else it would cut what a small model can see whole
    return made


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DependencyError("Images need Pillow.", "pip install 'layershare[vision]'") from None
    return Image
