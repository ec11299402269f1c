"""Running text for language models: documents read as a stream, never held whole, split without leaks.

A document is a row of a table (CSV, TSV, JSON lines, Parquet), or in a ``.txt`` file what stands between two blank
lines. Files may be larger than memory: they are read from front to back, once to see what is in them and once for
each use. What is kept of a document is a hash of 8 bytes, which also says where it belongs: equal documents always
fall into the same part, whatever the order of the files. No torch here.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layershare.errors import DataError, OptionError, nearest
from layershare.tasks.splits import text_key
from layershare.tasks.task import Paths

COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "content", "document", "body", "article", "sentence", "sentence1", "review", "abstract")
}
PARTS = ("train", "validation", "test")
PIECE = 1 << 20
"""A longer document of a .txt file, in characters, is cut at the end of a line."""

Found = tuple[int, str, Any]
"""(line or row number, name of the column, cell)"""


@dataclass(frozen=True)
class Corpus:
    """The documents of some files, in three parts with none in common.

    ``documents``: how many there are in each part. ``sha256``: file name as given -> SHA-256 of its bytes.
    ``columns``: role -> column, empty for plain text.
    """

    sha256: Mapping[str, str]
    columns: Mapping[str, str]
    documents: Mapping[str, int]
    notes: tuple[str, ...]
    _sources: Mapping[str, tuple[str, ...]] = field(repr=False)
    _bounds: tuple[int, int] = field(repr=False)
    _excluded: Mapping[str, frozenset[int]] = field(repr=False)
    _given: Mapping[str, str] = field(repr=False)
    _seed: int = field(repr=False)

    def stream(self, part: str) -> Iterator[str]:
        """The documents of ``train``, ``validation`` or ``test``, in file order, one at a time."""
        own = self._sources[part]
        for path in own or self._sources["train"]:
            for text in documents(path, self._given):
                place = _place(text, self._seed)
                if place not in self._excluded[part] and (
                    (own and part != "train") or self._part(place) == part
                ):
                    yield text

    def _part(self, place: int) -> str:
        return PARTS[2] if place < self._bounds[0] else PARTS[1] if place < self._bounds[1] else PARTS[0]


def read_corpus(
    paths: Paths,
    *,
    validation: Paths = (),
    test: Paths = (),
    columns: Mapping[str, str] | None = None,
    split: tuple[float, float, float] = (0.95, 0.05, 0.0),
    seed: int = 0,
) -> Corpus:
    """Look through the files once. ``validation`` and ``test`` name files of their own for these parts; otherwise the
    fractions of ``split`` are set aside, seeded. A document that a file for validation or test also has is left out
    of training, one that a file for test has also of validation.

    Raises DataError naming file, line and column, or when there are too few documents to set any aside, and
    OptionError for a split that is none.
    """
    if min(split) < 0 or abs(sum(split) - 1) > 1e-6 or split[0] <= 0:
        raise OptionError(f"The split {split} is not a division of the data.", "Use e.g. (0.9, 0.1, 0).")
    sources = {"train": _listed(paths), "validation": _listed(validation), "test": _listed(test)}
    if not sources["train"]:
        raise DataError("No data file was given.")
    given, seen, places = dict(columns or {}), {}, {}
    for part, files in sources.items():
        # A hash each: a billion words in documents of 200 words are 40 MB.
        places[part] = np.fromiter(
            (_place(text, seed) for path in files for text in documents(path, given)), dtype=np.uint64
        )
        for path in files:
            seen[path] = _sha256(path)
    notes: list[str] = []
    excluded = {"test": frozenset[int]()}
    for part, others in (("validation", ("test",)), ("train", ("validation", "test"))):
        held = np.unique(np.concatenate([places[other] for other in others]))
        leaked = np.isin(places[part], held)
        if leaked.any():
            notes.append(
                f"{leaked.sum()} of {leaked.size} {part} documents are also in files for {' or '.join(others)} "
                "and were left out."
            )
            if leaked.all():
                raise DataError(
                    f"Every document of {sources[part][0]} is also in a held-out file.", "Give others."
                )
        places[part] = places[part][~leaked]
        excluded[part] = frozenset(map(int, held))
    rest = places["train"]
    fractions = [0.0 if sources[part] else split[PARTS.index(part)] for part in ("test", "validation")]
    bounds = _bounds(rest, fractions, sources["train"][0])
    counts = {
        "train": int((rest >= bounds[1]).sum()),
        "validation": places["validation"].size or int(((rest >= bounds[0]) & (rest < bounds[1])).sum()),
        "test": places["test"].size or int((rest < bounds[0]).sum()),
    }
    table = next((path for path in sources["train"] if Path(path).suffix.lower() != ".txt"), None)
    chosen = {"text": next(_rows(table, given))[1]} if table else {}
    if chosen and chosen != given:
        notes.append(f"Columns: text = {chosen['text']!r}.")
    return Corpus(
        seen, chosen, counts, tuple(notes), sources, bounds, excluded, given, seed
    )  # fmt: skip


def documents(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[str]:
    """The documents of one file, empty ones left out. Raises DataError naming the line, and for an empty file."""
    none = True
    for number, column, cell in _rows(path, columns or {}):
        if isinstance(cell, str):
            if cell.strip():
                none = False
                yield cell
        elif cell is not None:
            raise DataError(
                f"{path}, line {number}, column {column!r}: expected a text, found a {type(cell).__name__}."
            )
    if none:
        raise DataError(f"{path}: is empty.", "It needs at least one document.")


def _rows(path: str | Path, columns: Mapping[str, str]) -> Iterator[Found]:
    file = Path(path)
    if wrong := next((role for role in columns if role not in COLUMNS), None):
        raise DataError(f"There is no column role {wrong!r}.", nearest(wrong, COLUMNS))
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot tell its format from the suffix.", f"Known: {', '.join(_READERS)}.")
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise DataError(f"{path}: {what}.", "Give the path of a data file.")
    return reader(file, columns.get("text"))


def _txt(path: Path, column: str | None) -> Iterator[Found]:  # noqa: ARG001 - one signature for all readers
    lines: list[str] = []
    start, size = 1, 0
    for number, line in _lines(path):
        line = line.rstrip("\r\n")
        if line.strip() and size < PIECE:
            start = start if lines else number
            lines.append(line)
            size += len(line)
            continue
        if lines:
            yield start, "text", "\n".join(lines)
        lines, size, start = ([line], len(line), number) if line.strip() else ([], 0, number)
    if lines:
        yield start, "text", "\n".join(lines)


def _jsonl(path: Path, column: str | None) -> Iterator[Found]:
    name = None
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error.msg}, character {error.colno})."
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a {type(row).__name__} where an object was expected.")
        name = name or _text_column(path, list(row), column)
        yield number, name, row.get(name)


def _delimited(dialect: Callable[[str], dict[str, Any]]) -> Callable[[Path, str | None], Iterator[Found]]:
    def read(path: Path, column: str | None) -> Iterator[Found]:
        header = next((line for _, line in _lines(path) if line.strip()), "")
        limit = csv.field_size_limit(1 << 30)  # the default of 128 KiB refuses long documents
        reader = csv.reader((line for _, line in _lines(path)), strict=True, **dialect(header))
        try:
            names: list[str] = []
            while True:
                start = reader.line_num + 1
                row = next(reader, None)
                if row is None:
                    return
                if not row:
                    continue
                if not names:
                    names = [name.strip() for name in row]
                    name = _text_column(path, names, column)
                elif len(row) != len(names):
                    raise DataError(
                        f"{path}, line {start}: {len(row)} columns where the header has {len(names)}."
                    )
                else:
                    yield start, name, row[names.index(name)]
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: {error}.", "Close the quote or double the inner ones."
            ) from None
        finally:
            csv.field_size_limit(limit)

    return read


def _parquet(path: Path, column: str | None) -> Iterator[Found]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            name = _text_column(path, file.schema_arrow.names, column)
            for batch in file.iter_batches(batch_size=1024, columns=[name]):
                for cell in batch.column(0).to_pylist():
                    number += 1
                    yield number, name, cell
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable Parquet file ({str(error).splitlines()[0]}).") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line with its end), decoded one by one so that a fault can be named."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: byte 0x{raw[error.start]:02x} is not UTF-8.",
                    "Save the file as UTF-8 (for example: iconv -f latin1 -t utf-8).",
                ) from None


def _text_column(path: Path, names: Sequence[str], given: str | None) -> str:
    if given is not None:
        if given not in names:
            raise DataError(f"{path}: no column {given!r} (wanted for the text).", nearest(given, names))
        return given
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in COLUMNS["text"] if name in lower), None)
    if found is None:
        raise DataError(
            f"{path}: no column for the text (looked for {', '.join(COLUMNS['text'])}); "
            f"the file has {', '.join(names)}.",
            "Say which one it is: --column text=NAME (in Python, columns={'text': NAME}).",
        )
    return found


def _bounds(places: np.ndarray, fractions: Sequence[float], name: str) -> tuple[int, int]:
    """Below the first hash is for test, below the second for validation: exact shares of the different documents."""
    different = np.unique(places)
    ends, taken = [], 0
    for fraction in fractions:
        taken += max(1, round(fraction * different.size)) if fraction else 0
        if taken >= different.size:
            raise DataError(
                f"{name}: {different.size} different documents are too few to set some aside.",
                "Give more (a blank line ends a document in a .txt file), or a file to judge on.",
            )
        ends.append(int(different[taken]) if taken else 0)
    return ends[0], ends[1]


def _place(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{text_key(text)}".encode(), digest_size=8).digest())


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(paths: Paths) -> tuple[str, ...]:
    single: Iterable[str | Path] = [paths] if isinstance(paths, (str, Path)) else paths
    return tuple(str(path) for path in single)


_READERS: dict[str, Callable[[Path, str | None], Iterator[Found]]] = {
    ".csv": _delimited(lambda header: {"delimiter": max(",;\t", key=header.count)}),
    ".tsv": _delimited(lambda _: {"delimiter": "\t", "quoting": csv.QUOTE_NONE}),
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".txt": _txt,
}
