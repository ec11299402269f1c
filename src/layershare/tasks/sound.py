"""Sounds: from files to what a speech model reads. Needs soundfile (WAV, FLAC, OGG, MP3), and scipy to resample."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layershare.errors import DependencyError, ModelError
from layershare.tasks.media import Medium, folder_tables, medium, stream
from layershare.tasks.reading import read_splits
from layershare.tasks.task import Data, Paths

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au", ".opus")
COLUMNS: dict[str, tuple[str, ...]] = {
    "audio": ("audio", "file_name", "path", "file", "filename", "wav", "sound", "audio_path", "clip"),
}
INPUTS = ("input_values", "input_features", "attention_mask")


def sound(cell: Any, folder: Path) -> Medium:
    """A cell of a table in ``folder`` as a sound that opens to its last sample, or ValueError."""
    reader = _soundfile()

    def whole(raw: io.BytesIO) -> None:
        if not len(reader.read(raw, dtype="float32")[0]):
            raise ValueError("no sample in it")

    return medium(cell, folder, whole, "a sound")


def at_most(seconds: float, cell: Any, folder: Path) -> Medium:
    """As :func:`sound`; ValueError also if it is longer, where a part of it would not be what is said of it."""
    found = sound(cell, folder)
    if (long := duration(found)) > seconds:
        raise ValueError(f"lasts {long:.1f} s, and seconds is {seconds:g}")
    return found


folders = partial(folder_tables, role="audio", suffixes=SUFFIXES)
"""How a folder of sounds is read, see :func:`~layershare.tasks.media.folder_tables`."""


def read_said(seconds: float, paths: Paths, **how: Any) -> Data:
    """Read sounds, in ``audio``, with what is said in them: a table with a column of paths, or a folder with a
    ``metadata.csv``. Every sound is opened, and kept nowhere. One that is longer than ``seconds`` is refused: cut, it
    would not be what is said of it. ``how``: as for :func:`~layershare.tasks.reading.read_splits`."""
    return read_splits(paths, beside={"audio": partial(at_most, seconds)}, folders=folders, **how)


def samples(one: Medium, rate: int) -> "np.ndarray":
    """The sound as one channel at ``rate`` samples a second, float32 in -1 to 1."""
    import numpy as np
    from scipy.signal import resample_poly

    found, own = _soundfile().read(stream(one), dtype="float32", always_2d=True)
    mono = found.mean(1)
    if own == rate:
        return mono
    common = math.gcd(own, rate)
    return np.asarray(resample_poly(mono, rate // common, own // common), dtype=np.float32)


def length(one: Medium, rate: int) -> int:
    """How many samples :func:`samples` gives, from the header alone."""
    told = _soundfile().info(stream(one))
    common = math.gcd(told.samplerate, rate)
    return -(-told.frames * (rate // common) // (told.samplerate // common))


def duration(one: Medium) -> float:
    """Its length in seconds, from the header alone."""
    return float(_soundfile().info(stream(one)).duration)


def halves(processor: Any) -> tuple[Any, Any]:
    """What goes before such a model, and what goes behind it: its feature extractor and its tokenizer."""
    found = getattr(processor, "feature_extractor", None), getattr(processor, "tokenizer", None)
    if None in found:
        raise ModelError(
            f"A {type(processor).__name__} is not a feature extractor and a tokenizer in one.",
            "Both must be in the model's folder.",
        )
    return found


def with_samples(processor: Any, rows: "Dataset", seconds: float) -> "Dataset":
    """Rows with ``audio``, and how many ``samples`` of each are read, if the model can be told by a mask."""
    if not _told(processor):
        return rows
    rate = processor.sampling_rate
    return rows.add_column("samples", [min(length(one, rate), int(seconds * rate)) for one in rows["audio"]])


def _hears_spectrograms(processor: Any) -> bool:
    return "input_features" in processor.model_input_names


def _told(processor: Any) -> bool:
    """Whether sounds of different length may stand in one batch."""
    return processor.return_attention_mask and not _hears_spectrograms(processor)


def collate(processor: Any, rows: Sequence[Mapping[str, Any]], *, seconds: float) -> "dict[str, Tensor]":
    """Rows with ``audio`` -> what the model reads: ``input_values`` [B, samples], or ``input_features``, and
    ``attention_mask`` where its feature extractor gives one; ``labels`` where they have any.

    Without a mask a model takes padding for sound. So that what it says of one sound does not depend on those beside
    it, all are then padded to ``seconds``, or to what the extractor itself fixes.
    """
    import torch

    rate = processor.sampling_rate
    waves = [samples(row["audio"], rate)[: int(seconds * rate)] for row in rows]
    fixed = getattr(processor, "n_samples", int(seconds * rate))
    how: dict[str, Any] = {"padding": True}
    if not _told(processor):
        how = {"padding": "max_length", "max_length": fixed}
        if _hears_spectrograms(processor):  # for a model that takes silence for silence it says where to look
            how["return_attention_mask"] = True
    made = processor(waves, sampling_rate=rate, return_tensors="pt", **how)
    batch = {name: made[name] for name in INPUTS if name in made}
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def counts(rows: Any, config: Any = None) -> dict[Any, list[int]]:
    """The samples of each sound, or, given a config, the frames that its model makes of them; nothing where all are
    padded to one length."""
    if "samples" not in getattr(rows, "column_names", rows):
        return {}
    found = rows["samples"][:]
    return {"source": found if config is None else [frames(config, one) for one in found]}


def mask_of(model: Any, batch: "Mapping[str, Tensor]") -> "Tensor | None":
    """[B, frames], 1 where the model hears sound and no padding; None where it is not told."""
    from layershare.sharing.padding import frames_of

    known = batch.get("attention_mask")
    found = None if known is None else frames_of(model, known)
    return None if found is None else found.long()


def frames(config: Any, count: Any) -> Any:
    """How many positions a model with this config makes of so many samples, by the convolutions at its beginning."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        count = (count - kernel) // stride + 1
    return count


def fresh_processor(config: Any) -> Any:
    """The feature extractor of a model that is made from this config alone: its type's own. What normalises each sound
    over time also reads a mask."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

    known: Any = FEATURE_EXTRACTOR_MAPPING.get(type(config), None)
    if known is None:
        raise ModelError(f"transformers has no feature extractor for {config.model_type}.")
    made = known()
    if hasattr(config, "feat_extract_norm"):
        made.return_attention_mask = config.feat_extract_norm == "layer"
    return made


def _soundfile() -> Any:
    try:
        import soundfile  # type: ignore[import-untyped]
    except ImportError:
        raise DependencyError("Sounds need soundfile.", "pip install 'layershare[speech]'") from None
    return soundfile
