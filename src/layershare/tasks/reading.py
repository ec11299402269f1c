"""Files -> Data, the same way for every task: choose columns, convert cells, split without leaks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layershare.errors import DataError
from layershare.tasks.files import Table, choose_columns, read_table
from layershare.tasks.splits import leaks, split_rows
from layershare.tasks.task import Data

if TYPE_CHECKING:
    from datasets import Dataset

Paths = Sequence[str | Path] | str | Path
TEXTS = ("text", "text_pair")


def read_splits(
    paths: Paths,
    test: Paths = (),
    *,
    candidates: Mapping[str, tuple[str, ...]],
    given: Mapping[str, str] | None,
    optional: frozenset[str],
    convert: Mapping[str, Callable[[Table, str], list[Any]]],
    together: Mapping[str, str] | None = None,
    stratify: str | None = None,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Data:
    """Read ``paths``, and the files only tested on, ``test``, into Data.

    ``together`` names roles that mean nothing without another one (a score without a second text); a guessed
    one is then left out, a given one raises. ``stratify`` is the role whose values each split gets in equal
    shares. With ``test``, rows of ``paths`` that share a text with it are left out, and the note says how
    many.
    """
    tables = [read_table(path) for path in _listed(paths)]
    tested = [read_table(path) for path in _listed(test)]
    if not tables:
        raise DataError("No data file was given.")
    chosen = choose_columns(tables, candidates, given, optional)
    for role, needs in (together or {}).items():
        if role in chosen and needs not in chosen:
            if given and role in given:
                raise DataError(f"The column {chosen[role]!r} ({role}) needs a column for {needs} beside it.")
            del chosen[role]
    # A test file may have what the training file lacks (scores), so it chooses for itself.
    test_chosen = choose_columns(tested, candidates, given, optional) if tested else {}
    for role, needs in (together or {}).items():
        if needs not in test_chosen:
            test_chosen.pop(role, None)
    rows = _convert(tables, chosen, convert)
    notes = [] if given == chosen else [f"Columns: {', '.join(f'{r} = {c!r}' for r, c in chosen.items())}."]
    held_out = _convert(tested, test_chosen, convert) if tested else None
    if held_out is not None:
        dropped = set(leaks(_texts(rows), _texts(held_out)))
        if dropped:
            count = len(_texts(rows))
            rows = {
                name: [v for i, v in enumerate(column) if i not in dropped] for name, column in rows.items()
            }
            notes.append(f"{len(dropped)} of {count} rows share a text with the test data and were left out.")
        if not _texts(rows):
            raise DataError(
                f"Every row of {tables[0].path} shares a text with the test data.", "Give other data."
            )
        rest = split[0] + split[1]
        split = (split[0] / rest, split[1] / rest, 0.0) if rest > 0 else split
    strata = rows[stratify] if stratify else None
    train, validation, own_test = (
        _take(rows, part) for part in split_rows(_texts(rows), split, seed, strata)
    )
    labels = {*rows.get("label", ()), *(held_out or {}).get("label", ())}
    return Data(
        train=train,
        validation=validation,
        test=own_test if held_out is None else _take(held_out, range(len(_texts(held_out)))),
        columns=chosen,
        sha256={table.path: table.sha256 for table in (*tables, *tested)},
        labels=tuple(sorted(labels, key=_by_number_then_name)),
        notes=tuple(notes),
    )


def _by_number_then_name(label: str) -> tuple[bool, int, str]:
    numbered = label.isascii() and label.isdigit()
    return not numbered, int(label) if numbered else 0, label


def _listed(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def _convert(
    tables: Sequence[Table],
    chosen: Mapping[str, str],
    convert: Mapping[str, Callable[[Table, str], list[Any]]],
) -> dict[str, list[Any]]:
    return {
        role: [v for table in tables for v in convert[role](table, name)] for role, name in chosen.items()
    }


def _texts(rows: Mapping[str, list[Any]]) -> list[tuple[str, ...]]:
    return list(zip(*(rows[name] for name in TEXTS if name in rows), strict=True))


def _take(rows: Mapping[str, list[Any]], part: Sequence[int]) -> "Dataset | None":
    from datasets import Dataset

    return (
        Dataset.from_dict({name: [column[i] for i in part] for name, column in rows.items()})
        if part
        else None
    )
