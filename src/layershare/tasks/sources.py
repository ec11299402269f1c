"""Where tables come from: files, ``datasets`` objects, and data sets of the hub. No torch here."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from layershare.errors import DataError
from layershare.tasks.files import READERS, Table, read_table

HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
"""What the parts of a data set are usually called -> our part; others are not read."""


Folders = Callable[[Path, "list[str] | None"], dict[str, list[Table]]]
"""(a folder, see ``bad`` below) -> part -> tables."""


def read_tables(
    source: Any, bad: list[str] | None = None, folders: Folders | None = None
) -> dict[str, list[Table]]:
    """Part -> the tables of ``source``; without parts of its own everything is in ``train``.

    ``source``: a path, see :func:`~layershare.tasks.files.read_table`; a ``datasets.Dataset`` or ``DatasetDict``; the
    name of a data set on the hub, ``OWNER/NAME`` or ``OWNER/NAME:CONFIGURATION`` (the only thing that needs a network);
    or a list of such things; with ``folders``, which says how, also a folder. Columns of structs are called
    ``outer.inner``, numbers of a ``ClassLabel`` become names.
    Raises DataError; lines that cannot be read are told in ``bad``, if it is given, and left out.
    """
    found: dict[str, list[Table]] = {}
    for one in listed(source):
        for part, table in _read(one, bad, folders):
            found.setdefault(part, []).append(table)
    return found


def listed(source: Any) -> list[Any]:
    """A list of sources, also of a single one."""
    return list(source) if isinstance(source, (list, tuple)) else [source]


def is_file_name(source: Any) -> bool:
    """Whether this is a path, and not OWNER/NAME of a data set on the hub without any such file, nor an object."""
    if not isinstance(source, (str, Path)):
        return False
    known = Path(source).exists() or Path(source).suffix.lower() in READERS
    return known or not HUB.fullmatch(str(source))


def _read(source: Any, bad: list[str] | None, folders: Folders | None) -> list[tuple[str, Table]]:
    if folders is not None and isinstance(source, (str, Path)) and (folder := Path(source)).is_dir():
        return [(part, table) for part, tables in folders(folder, bad).items() for table in tables]
    if is_file_name(source):
        return [("train", read_table(source, bad))]
    name = str(source) if isinstance(source, (str, Path)) else "the data set"
    data = _from_hub(name) if isinstance(source, (str, Path)) else source
    if hasattr(data, "column_names") and not isinstance(data, Mapping):
        return [("train", _table(data, name))]
    if not isinstance(data, Mapping):
        raise DataError(
            f"A {type(data).__name__} is no data.",
            "Give files, a datasets.Dataset or DatasetDict, or OWNER/NAME.",
        )
    parts = [(SPLITS[part], _table(one, f"{name}[{part}]")) for part, one in data.items() if part in SPLITS]
    if "train" not in dict(parts):
        raise DataError(f"{name} has no split 'train', only {', '.join(data)}.", "Give one split of it.")
    return parts


def _from_hub(name: str) -> Any:
    import datasets

    path, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises whatever its parts raise
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name}: no such file, and the hub did not give a data set of that name ({why}).",
            "A data set is OWNER/NAME or OWNER/NAME:CONFIGURATION.",
        ) from None


def _table(data: Any, name: str) -> Table:
    flat = data.flatten()
    for column, feature in flat.features.items():
        if getattr(feature, "decode", False):  # an image or a sound: its bytes will do
            flat = flat.cast_column(column, replace(feature, decode=False))
    columns = {column: _named(flat.features[column], flat[column][:]) for column in flat.column_names}
    digest = hashlib.sha256(json.dumps(columns, default=_told).encode())
    if not len(flat):
        raise DataError(f"{name}: is empty.", "It needs at least one row of data.")
    return Table(name, columns, range(1, len(flat) + 1), digest.hexdigest(), unit="row")


def _told(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _named(feature: Any, values: list[Any]) -> list[Any]:
    """Numbers of a ClassLabel, alone or in lists, as names; -1 means that there is none."""
    inner = getattr(feature, "feature", feature)
    if not hasattr(inner, "int2str"):
        return values

    def name(value: Any) -> Any:
        return None if value is None or value < 0 else inner.int2str(value)

    return [[name(v) for v in value] if isinstance(value, list) else name(value) for value in values]
