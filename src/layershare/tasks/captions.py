"""Images with texts: a caption each, or what a template makes of the image's label."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from layershare.config import Config
from layershare.errors import DataError
from layershare.tasks import classification, vision
from layershare.tasks.files import label, text
from layershare.tasks.reading import read_splits
from layershare.tasks.task import Data, Paths

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS: dict[str, tuple[str, ...]] = vision.COLUMNS | {
    "caption": ("caption", "text", "description", "sentence", "target", "title", "prompt"),
    "label": classification.COLUMNS["label"],
}
OPTIONAL = frozenset({"caption", "label"})


class Settings(Config):
    """What is said of an image."""

    template: str = Field(
        "a photo of a {}.",
        description="The text of an image that has a label and no caption; {} is the label.",
    )

    @field_validator("template")
    @classmethod
    def _one_place(cls, value: str) -> str:
        if value.count("{}") != 1 or {"{", "}"} & set(value.replace("{}", "")):
            raise ValueError("needs one {}, where the label goes, and no other brace")
        return value


def read_captions(template: str, paths: Paths, **how: Any) -> Data:
    """Read images with their captions. Where there are labels alone, as in a folder ``LABEL/IMAGE``, the captions are
    made of these. No image is in two parts; captions may be."""
    data = read_splits(
        paths, candidates=COLUMNS, optional=OPTIONAL, folders=vision.folders,
        convert={"caption": text, "label": label}, beside={"image": vision.image}, stratify="label", **how,
    )  # fmt: skip
    if "caption" in data.columns:  # then it does not matter what labels there are
        plain: dict[str, Any] = {
            name: part and part.select_columns(["image", "caption"]) for name, part in data.splits.items()
        }
        return replace(data, **plain, labels=())
    if "label" not in data.columns:
        raise DataError(
            f"{data.files[0]}: no column for the caption (looked for {', '.join(COLUMNS['caption'])}) nor for a label.",
            "Say which one it is: --column caption=NAME.",
        )
    parts: dict[str, Any] = {name: part and _named(part, template) for name, part in data.splits.items()}
    note = f"Captions: {template!r}, of the label of each image."
    return replace(data, **parts, notes=(*data.notes, note))


def _named(part: "Dataset", template: str) -> "Dataset":
    told = [template.format(name) for name in part["label"]]
    return part.remove_columns("label").add_column("caption", told)


def pairs(dataset: "Dataset") -> "Dataset":
    """One row for each different pair of an image and its caption."""
    keys = zip([one["sha256"] for one in dataset["image"]], dataset["caption"][:], strict=True)
    first: dict[Any, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    return dataset.select_columns(["image", "caption"]).select(list(first.values()))


def texts(data: Data) -> list[str]:
    """The different captions of the training images, in file order."""
    return [] if data.train is None else list(dict.fromkeys(data.train["caption"]))
