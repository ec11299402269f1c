"""Bytes of weights in a model folder."""

import json
import os
from pathlib import Path

from layershare.errors import StoreError

# in the order in which transformers looks for them: only the first kind found is loaded, so only it counts
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ("model.onnx", "", "*.onnx*"),
)


def bytes_on_disk(folder: str | os.PathLike) -> int:
    """Bytes of the weight files that loading ``folder`` reads: no tokenizer, optimizer state or stale shards.

    Raises:
        StoreError: no such folder, no weights in it, or an index that names a missing shard.
    """
    return sum(file.stat().st_size for file in weight_files(folder))


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The weight files that loading ``folder`` reads, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise StoreError(f"No folder {folder}.", "Give a folder written by save_pretrained.")
    for single, index, pattern in WEIGHTS:
        if (folder / single).is_file() and not single.endswith(".onnx"):
            return [folder / single]
        if index and (folder / index).is_file():
            return _shards(folder / index)
        if files := sorted(file for file in folder.glob(pattern) if file.is_file()):
            return files
    raise StoreError(f"No weights in {folder}.", "Expected model.safetensors, or shards with an index.")


def _shards(index: Path) -> list[Path]:
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise StoreError(f"{index} names {name}, which is missing.", "Copy the folder again.")
    return [index.parent / name for name in names]
