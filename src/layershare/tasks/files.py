"""Tables from CSV, TSV, JSON lines, Parquet and plain text, with the line number of every row kept.

The line numbers are why this is not ``datasets.load_dataset`` or ``pandas.read_csv``: both lose them, so an
error could not say where the fault is. No torch here.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from layershare.errors import DataError, nearest

_T = TypeVar("_T")


@dataclass(frozen=True)
class Table:
    """Columns of one file. ``lines[i]`` is where row i starts in the file (a row number for Parquet)."""

    path: str
    columns: Mapping[str, list[Any]]
    lines: Sequence[int]
    sha256: str
    unit: str = "line"

    def at(self, row: int, column: str) -> str:
        """Where a cell is, in words for an error message."""
        return f"{self.path}, {self.unit} {self.lines[row]}, column {column!r}"


def read_table(path: str | Path, bad: list[str] | None = None) -> Table:
    """Read one file; its kind is told by its suffix.

    ``.csv`` (comma, semicolon or tab, told from the header; quoted as usual), ``.tsv`` (one tab between
    columns, quotes are ordinary characters), ``.jsonl`` (an object a line), ``.parquet``, ``.txt`` (a text a
    line, column ``text``). All but Parquet are UTF-8. Blank lines are skipped. Raises DataError; given ``bad``,
    lines that cannot be read are left out and told there instead.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None and path.is_dir():
        raise DataError(f"{path}: is a folder.", "Give the path of a data file.")
    if reader is None:
        raise DataError(f"{path}: cannot tell its format from the suffix.", f"Known: {', '.join(READERS)}.")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {what}.", "Give the path of a data file.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    table = _opened(reader(str(path), raw, hashlib.sha256(raw).hexdigest(), bad))
    if not table.lines:
        raise DataError(f"{path}: is empty.", "It needs at least one row of data.")
    return table


def _opened(table: Table) -> Table:
    """With what is inside of columns of objects as columns too, called ``outer.inner`` as ``datasets`` calls them."""
    inner: dict[str, list[Any]] = {}
    for name, values in table.columns.items():
        told = [value for value in values if value is not None]
        if not told or not all(isinstance(value, dict) for value in told):
            continue
        for key in dict.fromkeys(key for value in told for key in value):
            if f"{name}.{key}" not in table.columns:
                inner[f"{name}.{key}"] = [value and value.get(key) for value in values]
    return replace(table, columns={**table.columns, **inner}) if inner else table


def choose_columns(
    tables: Sequence[Table],
    candidates: Mapping[str, tuple[str, ...]],
    given: Mapping[str, str] | None = None,
    optional: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """Role -> column, the same for all tables.

    A column that was ``given`` for a role must exist; another role takes the first of its candidates that
    the first table has, compared without case. A role that is neither found nor optional raises DataError.
    """
    given = dict(given or {})
    for role in given:
        if role not in candidates:
            raise DataError(f"There is no column role {role!r}.", nearest(role, candidates))
    first = tables[0]
    by_lower = {name.lower(): name for name in reversed(list(first.columns))}
    taken = set(given.values())
    chosen = {}
    for role, names in candidates.items():
        found = given.get(role) or next(
            (by_lower[n] for n in names if n in by_lower and by_lower[n] not in taken), None
        )
        if found is not None:
            chosen[role] = found
            taken.add(found)
        elif role not in optional:
            raise DataError(
                f"{first.path}: no column for the {role} (looked for {', '.join(names)}); "
                f"the file has {', '.join(first.columns)}.",
                f"Say which one it is: --column {role}=NAME (in Python, columns={{{role!r}: NAME}}).",
            )
    for table in tables:
        for role, name in chosen.items():
            if name not in table.columns:
                raise DataError(
                    f"{table.path}: no column {name!r} (wanted for the {role}).", nearest(name, table.columns)
                )
    return chosen


def cells(
    table: Table, column: str, convert: Callable[[Any], _T], bad: dict[int, str] | None = None
) -> list[_T | None]:
    """Every cell of a column, converted. One that is empty, or that ``convert`` refuses with ValueError, raises
    DataError with its place; given ``bad`` it is None instead, and row -> what is wrong is written there."""
    out: list[_T | None] = []
    for row, cell in enumerate(table.columns[column]):
        try:
            if cell is None or (isinstance(cell, str) and not cell.strip()) or cell != cell:
                raise ValueError("is empty")
            out.append(convert(cell))
        except ValueError as error:
            message = f"{table.at(row, column)}: {error}."
            if bad is None:
                hint = "Fill it in or remove the row, or leave out all such rows with --skip-bad."
                raise DataError(message, hint if str(error) == "is empty" else "") from None
            bad.setdefault(row, message)
            out.append(None)
    return out


def text(cell: Any) -> str:
    """A cell as a text."""
    if isinstance(cell, (dict, list)):
        raise ValueError(f"expected a text, found a {type(cell).__name__}")
    found = str(cell)
    if not found.isascii():
        try:
            found.encode()
        except UnicodeEncodeError:
            raise ValueError("holds bytes that are not UTF-8") from None
    return found


def number(cell: Any) -> float:
    """A cell as a finite number."""
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) < float("inf"):  # also true for nan
        raise ValueError(f"{str(cell)[:40]!r} is not a number")
    return value


def label(cell: Any) -> str:
    """A cell as the name of a label; 1, 1.0, "1.0" and true are all "1"."""
    if isinstance(cell, (dict, list)):
        raise ValueError(f"expected one label, found a {type(cell).__name__}")
    if isinstance(cell, float) and not cell.is_integer():
        raise ValueError(f"{cell!r} is not a label (a text or a whole number)")
    if isinstance(cell, (bool, float)):
        return str(int(cell))
    # pandas writes a column of whole numbers with a gap in it as 1.0
    return re.sub(r"^(\d+)\.0+$", r"\1", text(cell).strip())


def labels(cell: Any) -> list[str]:
    """A cell as several labels: a list, or a text with ``|``, ``;`` or ``,`` between them."""
    found = cell if isinstance(cell, list) else re.split(r"\s*[|;,]\s*", text(cell).strip())
    return sorted({label(one) for one in found})


def words(cell: Any) -> list[str]:
    """A cell as words, or the tags of words: a list, or a text with spaces between them."""
    found = cell if isinstance(cell, list) else text(cell).split()
    if not found:
        raise ValueError("is empty")
    return [label(one) for one in found]


def _decode(path: str, raw: bytes, bad: list[str] | None) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if bad is not None:
            return raw.decode("utf-8-sig", errors="surrogateescape")  # and the cells are refused one by one
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8.",
            "Save the file as UTF-8 (for example: iconv -f latin1 -t utf-8).",
        ) from None


def _refuse(error: DataError, bad: list[str] | None) -> None:
    """Raise, or tell of a line that is left out."""
    if bad is None:
        raise error from None
    bad.append(error.message)


def _read_csv(path: str, raw: bytes, sha256: str, bad: list[str] | None) -> Table:
    text = _decode(path, raw, bad)
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(",;\t", key=header.count)  # the first of equals: a comma
    return _delimited(path, text, sha256, bad, delimiter=delimiter, strict=True)


def _read_tsv(path: str, raw: bytes, sha256: str, bad: list[str] | None) -> Table:
    text = _decode(path, raw, bad)
    return _delimited(path, text, sha256, bad, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited(path: str, text: str, sha256: str, bad: list[str] | None, **dialect: Any) -> Table:
    limit = csv.field_size_limit(len(text) + 1)  # the default of 128 KiB refuses long documents
    rows, lines, start = [], [], 1
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        # Where a quote is open nobody knows what is a line, so this one cannot be skipped.
        raise DataError(
            f"{path}, line {start}: {error}.", "Close the quote or double the inner ones."
        ) from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise DataError(f"{path}: is empty.", "The first line must name the columns.")
    header = [name.strip() for name in rows[0]]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path}, line {lines[0]}: two columns are called {twice!r}.", "Rename one.")
    kept = []
    for place, (row, line) in enumerate(zip(rows, lines, strict=True)):
        if len(row) == len(header):
            kept.append(place)
            continue
        problem = f"{path}, line {line}: {len(row)} columns where the header has {len(header)} ({', '.join(header)})."
        tabs = dialect["delimiter"] == "\t"
        hint = (
            "Exactly one tab must stand between two columns."
            if tabs
            else "A value that contains the separator must be quoted."
        )
        _refuse(DataError(problem, hint), bad)
    columns = {name: [rows[place][i] for place in kept[1:]] for i, name in enumerate(header)}
    return Table(path, columns, [lines[place] for place in kept[1:]], sha256)


def _read_jsonl(path: str, raw: bytes, sha256: str, bad: list[str] | None) -> Table:
    rows: list[dict[str, Any]] = []
    lines = []
    # Not splitlines(): a text may hold U+2028, which is no line end in JSON lines.
    for number, line in enumerate(_decode(path, raw, bad).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{path}, line {number}: not JSON ({error.msg}, character {error.colno})."
            _refuse(DataError(problem, "Each line must be one complete object."), bad)
            continue
        if not isinstance(row, dict):
            problem = f"{path}, line {number}: a {type(row).__name__} where an object was expected."
            _refuse(DataError(problem, 'Each line must look like {"text": "..."}.'), bad)
            continue
        rows.append(row)
        lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [row.get(name) for row in rows] for name in names}, lines, sha256)


def _read_parquet(path: str, raw: bytes, sha256: str, bad: list[str] | None) -> Table:  # noqa: ARG001 - as the others
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        columns = pq.read_table(pa.BufferReader(raw)).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable Parquet file ({str(error).splitlines()[0]}).") from None
    rows = len(next(iter(columns.values()), ()))
    return Table(path, columns, range(1, rows + 1), sha256, unit="row")


def _read_txt(path: str, raw: bytes, sha256: str, bad: list[str] | None) -> Table:
    kept = [(number, line.rstrip("\r")) for number, line in enumerate(_decode(path, raw, bad).split("\n"), 1)]
    kept = [(number, line) for number, line in kept if line.strip()]
    return Table(path, {"text": [line for _, line in kept]}, [number for number, _ in kept], sha256)


READERS: dict[str, Callable[[str, bytes, str, list[str] | None], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
