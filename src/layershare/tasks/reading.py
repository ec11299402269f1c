"""Tables -> Data, the same way for every task: choose columns, convert cells, split without leaks."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layershare.errors import DataError
from layershare.tasks.files import Table, cells, choose_columns
from layershare.tasks.sources import Folders, read_tables
from layershare.tasks.splits import leaks, split_rows
from layershare.tasks.task import Data, Paths

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("text", "text_pair", "words", "image", "audio")
"""The roles whose values no two parts may have in common."""
PARTS = ("train", "validation", "test")
TOLD = 5
"""So many of the rows that were skipped are told one by one."""

Rows = dict[str, list[Any]]


def read_splits(
    paths: Paths,
    *,
    candidates: Mapping[str, tuple[str, ...]],
    convert: Mapping[str, Callable[[Any], Any]],
    optional: frozenset[str] = frozenset(),
    together: Mapping[str, str] | None = None,
    equal: tuple[str, str] | None = None,
    fits: tuple[str, str, Callable[[Any, Any], None]] | None = None,
    stratify: str | None = None,
    beside: Mapping[str, Callable[[Any, Path], Any]] | None = None,
    folders: Folders | None = None,
    test: Paths = (),
    validation: Paths = (),
    columns: Mapping[str, str] | None = None,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    skip_bad: bool = False,
) -> Data:
    """Read ``paths``, the files only tested on, ``test``, and those only chosen on, ``validation``, into Data.

    ``candidates`` to ``folders`` are the task's, which gives them with ``partial``; the rest is as in
    :class:`~layershare.tasks.task.Task`. ``candidates``: role -> names that its column may have; ``convert``: role ->
    what makes a value of a cell, or raises ValueError; ``beside``: the same of a cell and the folder in which its table
    lies. ``folders``: how a folder is read; without it, it is refused. ``together`` names roles that mean nothing
    without another one (a score without a second text); a guessed one is then left out, a given one raises. ``equal``:
    two roles whose lists must be equally long; ``fits``: two roles, and what raises ValueError where the second's value
    does not go with the first's. ``stratify`` is the role whose values each split gets in equal shares.
    Parts without files of their own are split off from ``paths``, unless ``paths`` is a data set with parts. No text
    stands in two parts: rows of ``paths`` that share one with validation or test are left out, and so are rows of
    validation that share one with test; the notes say how many. With ``skip_bad`` rows that cannot be read are left
    out as well, and the notes say how many and why.
    """
    lines: list[str] | None = [] if skip_bad else None
    tables = read_tables(paths, lines, folders)
    if not tables.get("train"):
        raise DataError("No data file was given.")
    for part, given_files in (("validation", validation), ("test", test)):
        if own := read_tables(given_files, lines, folders):
            tables[part] = [table for found in own.values() for table in found]
    used = [table for part in PARTS for table in tables.get(part, ())]
    rows: dict[str, Rows] = {}
    chosen: dict[str, str] = {}
    skipped, total = list(lines or ()), sum(len(table.lines) for table in used) + len(lines or ())
    for part in PARTS:
        if part in tables:
            # A file may have what the training file lacks (scores), so each part chooses for itself.
            own_columns = choose_columns(tables[part], candidates, columns, optional)
            for role, needs in (together or {}).items():
                if role in own_columns and needs not in own_columns:
                    if columns and role in columns and part == "train":
                        raise DataError(
                            f"The column {own_columns[role]!r} ({role}) needs a column for {needs} beside it."
                        )
                    del own_columns[role]
            chosen = chosen or own_columns
            rows[part] = _convert(
                tables[part], own_columns, convert, beside or {}, equal, fits, skipped if skip_bad else None
            )
    notes = [] if columns == chosen else [f"Columns: {', '.join(f'{r} = {c!r}' for r, c in chosen.items())}."]
    if skipped:
        more = f" ... and {len(skipped) - TOLD} more" if len(skipped) > TOLD else ""
        notes.append(f"{len(skipped)} of {total} rows were skipped: {' '.join(skipped[:TOLD])}{more}")
    sha256 = _hashes(tables, rows)
    first = tables["train"][0].path
    if "validation" in rows and "test" in rows:
        what = f"validation rows of {tables['validation'][0].path}", "test"
        rows["validation"] = _without(rows["validation"], rows["test"], *what, notes)
    for name in ("test", "validation"):
        if name in rows:
            rows["train"] = _without(rows["train"], rows[name], f"rows of {first}", name, notes)
    held: dict[str, Rows] = {name: rows[name] for name in ("validation", "test") if name in rows}
    strata = rows["train"].get(stratify) if stratify else None
    fractions = _rest(split, held)
    parts = dict(zip(PARTS, split_rows(_texts(rows["train"]), fractions, seed, strata), strict=True))
    labels = {label for part in rows.values() for label in part.get("label", ())}
    for role in ("labels", "tags"):
        labels |= {label for part in rows.values() for several in part.get(role, ()) for label in several}
    return Data(
        train=_take(rows["train"], parts["train"]),
        validation=_whole(held["validation"])
        if "validation" in held
        else _take(rows["train"], parts["validation"]),
        test=_whole(held["test"]) if "test" in held else _take(rows["train"], parts["test"]),
        columns=chosen,
        sha256=sha256,
        labels=tuple(sorted(labels, key=_by_number_then_name)),
        notes=tuple(notes),
    )


def _without(rows: Rows, held: Mapping[str, list[Any]], what: str, name: str, notes: list[str]) -> Rows:
    """``rows`` without those that share a text with the part ``name``; a note says how many those were."""
    count = len(_texts(rows))
    dropped = set(leaks(_texts(rows), _texts(held)))
    if len(dropped) == count:
        raise DataError(f"All {count} {what} share a text with the {name} data.", "Give other data.")
    if dropped:
        notes.append(f"{len(dropped)} of {count} {what} share a text with the {name} data and were left out.")
    return {role: [v for i, v in enumerate(column) if i not in dropped] for role, column in rows.items()}


def _rest(split: tuple[float, float, float], held: Mapping[str, Any]) -> tuple[float, float, float]:
    """The split of what is left when some parts have files of their own."""
    left = [share if name not in held else 0.0 for name, share in zip(PARTS, split, strict=True)]
    whole = sum(left)
    return (left[0] / whole, left[1] / whole, left[2] / whole) if held and whole > 0 else split


def _by_number_then_name(label: str) -> tuple[bool, int, str]:
    numbered = label.isascii() and label.isdigit()
    return not numbered, int(label) if numbered else 0, label


def _convert(
    tables: Sequence[Table],
    chosen: Mapping[str, str],
    convert: Mapping[str, Callable[[Any], Any]],
    beside: Mapping[str, Callable[[Any, Path], Any]],
    equal: tuple[str, str] | None,
    fits: tuple[str, str, Callable[[Any, Any], None]] | None,
    skipped: list[str] | None,
) -> Rows:
    """The converted cells of each role; with ``skipped`` rows that have a bad one are left out and told there."""
    rows: Rows = {role: [] for role in chosen}
    for table in tables:
        bad: dict[int, str] = {}
        folder = Path(table.path).parent
        near = {role: partial(_beside, make, folder) for role, make in beside.items()}
        columns = {
            role: cells(table, name, near.get(role) or convert[role], None if skipped is None else bad)
            for role, name in chosen.items()
        }
        first, second = equal or ("", "")
        for row in range(len(table.lines)) if {first, second} <= set(chosen) else ():
            one, other = columns[first][row], columns[second][row]
            if one is not None and other is not None and len(one) != len(other):
                place = table.at(row, chosen[second])
                bad.setdefault(row, f"{place}: {len(other)} {second} for {len(one)} {first}.")
                if skipped is None:
                    raise DataError(bad[row], "Each needs exactly one.")
        if fits is not None and set(fits[:2]) <= set(chosen):
            _fitting(table, fits, chosen, columns, None if skipped is None else bad)
        if skipped is not None:
            skipped += [bad[row] for row in sorted(bad)]
        if bad and len(bad) == len(table.lines):
            raise DataError(f"{table.path}: not one row can be read. The first: {bad[min(bad)]}")
        for role, values in columns.items():
            rows[role] += [value for row, value in enumerate(values) if row not in bad]
    return rows


def _fitting(
    table: Table,
    fits: tuple[str, str, Callable[[Any, Any], None]],
    chosen: Mapping[str, str],
    columns: Mapping[str, list[Any]],
    bad: dict[int, str] | None,
) -> None:
    first, second, fit = fits
    for row, (one, other) in enumerate(zip(columns[first], columns[second], strict=True)):
        try:
            if one is not None and other is not None:
                fit(one, other)
        except ValueError as error:
            message = f"{table.at(row, chosen[second])}: {error}."
            if bad is None:
                raise DataError(
                    message, "Mend the row, or leave out all such rows with --skip-bad."
                ) from None
            bad.setdefault(row, message)


def _beside(make: Callable[[Any, Path], Any], folder: Path, cell: Any) -> Any:
    return make(cell, folder)


def _texts(rows: Mapping[str, list[Any]]) -> list[tuple[str, ...]]:
    sides = [[_one(value) for value in rows[name]] for name in TEXTS if name in rows]
    return list(zip(*sides, strict=True))


def _one(value: Any) -> str:
    if isinstance(value, dict):
        return str(value["sha256"])
    return value if isinstance(value, str) else " ".join(value)


def _hashes(tables: Mapping[str, Sequence[Table]], rows: Mapping[str, Rows]) -> dict[str, str]:
    """File -> SHA-256 of its bytes; of a table that names other files, also of what is in these."""
    found = {table.path: table.sha256 for part in PARTS for table in tables.get(part, ())}
    for part, columns in rows.items():
        inner = [cell["sha256"] for column in columns.values() for cell in column if isinstance(cell, dict)]
        for table in tables[part] if inner else ():
            found[table.path] = hashlib.sha256("/".join([found[table.path], *inner]).encode()).hexdigest()
    return found


def _take(rows: Mapping[str, list[Any]], part: Sequence[int]) -> "Dataset | None":
    from datasets import Dataset

    return (
        Dataset.from_dict({name: [column[i] for i in part] for name, column in rows.items()})
        if part
        else None
    )


def _whole(rows: Mapping[str, list[Any]]) -> "Dataset | None":
    return _take(rows, range(len(_texts(rows))))
