"""Images and sounds in a data set: where they are, not what is in them. No decoder, no torch.

A cell of a table is a path (relative to the table's file), the bytes themselves, or ``{"path": ..., "bytes": ...}`` as
``datasets`` writes it; a folder is a table with the name of the inner folder as label. In a split each becomes a
:class:`Medium`, which is opened again whenever a batch needs it, so nothing decoded is held in memory.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from layershare.errors import DataError
from layershare.tasks.files import READERS, Table, read_table

PARTS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
"""What folders of parts are usually called -> our part."""

INDEX = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""A table in a folder, with a column ``file_name``, as ``datasets`` has it."""


class Medium(TypedDict):
    """One image or sound: its file, or else its bytes, and the SHA-256 of these."""

    path: str | None
    bytes: bytes | None
    sha256: str


def medium(cell: Any, folder: Path, opens: Callable[[io.BytesIO], object], what: str) -> Medium:
    """A cell of a table in ``folder``. ValueError, which says why, if there is no file or ``opens`` raises: whatever a
    decoder raises means that this is no ``what`` (an image, a sound)."""
    path, raw = None, None
    if isinstance(cell, Mapping) and {"path", "bytes"} & cell.keys():
        path, raw = cell.get("path"), cell.get("bytes")
    elif isinstance(cell, bytes):
        raw = cell
    elif isinstance(cell, str):
        path = cell.strip()
    else:
        raise ValueError(f"expected the path of {what}, found a {type(cell).__name__}")
    if raw is None:
        if not path:
            raise ValueError("is empty")
        file = folder / Path(path).expanduser()
        path = str(file)
        try:
            raw_now = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    else:
        path, raw_now = None, raw
    try:
        opens(io.BytesIO(raw_now))
    except Exception as error:  # a decoder raises whatever it likes
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path or 'the cell'} does not open as {what} ({why})") from None
    return {"path": path, "bytes": raw, "sha256": hashlib.sha256(raw_now).hexdigest()}


def stream(one: Medium) -> io.BytesIO:
    """Its bytes. Raises DataError if its file is gone, or is another one than when it was read."""
    if one["bytes"] is not None:
        return io.BytesIO(one["bytes"])
    try:
        raw = Path(str(one["path"])).read_bytes()
    except OSError as error:
        raise DataError(f"{one['path']}: cannot be read any more ({error.strerror}).") from None
    if hashlib.sha256(raw).hexdigest() != one["sha256"]:
        raise DataError(f"{one['path']} has changed since the run began.", "Start again.")
    return io.BytesIO(raw)


def folder_tables(
    folder: Path, bad: list[str] | None = None, *, role: str, suffixes: Sequence[str]
) -> dict[str, list[Table]]:
    """Part -> tables of a folder: of its ``metadata.csv`` (or .jsonl, .parquet) where it has one, else of the files
    with these ``suffixes`` in it and in the folders in it, whose names are the ``label``. Folders called ``train``,
    ``validation`` and ``test`` are parts. Files are taken by name, so their order is the same everywhere.

    Raises DataError where there is none.
    """
    parts = {one: PARTS[one.name.lower()] for one in _folders(folder) if one.name.lower() in PARTS}
    if "train" not in parts.values():
        return {"train": [_folder_table(folder, role, suffixes, bad)]}
    found: dict[str, list[Table]] = {}
    for one, part in parts.items():
        found.setdefault(part, []).append(_folder_table(one, role, suffixes, bad))
    return found


def _folder_table(folder: Path, role: str, suffixes: Sequence[str], bad: list[str] | None) -> Table:
    if index := next((folder / name for name in INDEX if (folder / name).is_file()), None):
        return read_table(index, bad)
    files = [
        (file.relative_to(folder), inner.name if inner != folder else None)
        for inner in [folder, *_folders(folder)]
        for file in sorted(inner.iterdir())
        if file.suffix.lower() in suffixes and not file.name.startswith(".")
    ]
    if not files:
        tables = [file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in READERS]
        raise DataError(
            f"{folder}: no file with one of the suffixes {', '.join(suffixes)}, in it or in the folders in it.",
            f"There is a table, {folder / tables[0]}: give that." if tables else "It should hold LABEL/FILE.",
        )
    names = [str(name) for name, _ in files]
    columns: dict[str, list[Any]] = {role: [f"{folder.name}/{name}" for name in names]}
    if any(label is not None for _, label in files):
        columns["label"] = [label for _, label in files]
    # What is in the files is hashed when they are opened.
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return Table(str(folder), columns, range(1, len(files) + 1), digest, unit="file")


def _folders(folder: Path) -> list[Path]:
    return [one for one in sorted(folder.iterdir()) if one.is_dir() and not one.name.startswith(".")]
