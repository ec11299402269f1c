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
PARTS = ("train", "validation", "test")


def read_splits(
    paths: Paths,
    test: Paths = (),
    validation: Paths = (),
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
    """Read ``paths``, the files only tested on, ``test``, and those only chosen on, ``validation``, into Data.

    ``together`` names roles that mean nothing without another one (a score without a second text); a guessed
    one is then left out, a given one raises. ``stratify`` is the role whose values each split gets in equal
    shares. Parts without files of their own are split off from ``paths``. No text stands in two parts: rows of
    ``paths`` that share one with a file for validation or test are left out, and so are rows of ``validation`` that
    share one with ``test``; the notes say how many.
    """
    tables = [read_table(path) for path in _listed(paths)]
    if not tables:
        raise DataError("No data file was given.")
    apart = {"test": [*map(read_table, _listed(test))], "validation": [*map(read_table, _listed(validation))]}
    chosen = choose_columns(tables, candidates, given, optional)
    for role, needs in (together or {}).items():
        if role in chosen and needs not in chosen:
            if given and role in given:
                raise DataError(f"The column {chosen[role]!r} ({role}) needs a column for {needs} beside it.")
            del chosen[role]
    rows = _convert(tables, chosen, convert)
    notes = [] if given == chosen else [f"Columns: {', '.join(f'{r} = {c!r}' for r, c in chosen.items())}."]
    held = {}
    for name, files in apart.items():
        if files:
            # A file may have what the training file lacks (scores), so each part chooses for itself.
            own = choose_columns(files, candidates, given, optional)
            for role, needs in (together or {}).items():
                if needs not in own:
                    own.pop(role, None)
            held[name] = _convert(files, own, convert)
    if len(held) == 2:
        what = f"validation rows of {apart['validation'][0].path}", "test"
        held["validation"] = _without(held["validation"], held["test"], *what, notes)
    for name, other in held.items():
        rows = _without(rows, other, f"rows of {tables[0].path}", name, notes)
    split = _rest(split, held)
    strata = rows[stratify] if stratify else None
    parts = dict(zip(PARTS, split_rows(_texts(rows), split, seed, strata), strict=True))
    labels = {label for part in (rows, *held.values()) for label in part.get("label", ())}
    return Data(
        train=_take(rows, parts["train"]),
        validation=_whole(held["validation"]) if "validation" in held else _take(rows, parts["validation"]),
        test=_whole(held["test"]) if "test" in held else _take(rows, parts["test"]),
        columns=chosen,
        sha256={table.path: table.sha256 for table in (*tables, *apart["validation"], *apart["test"])},
        labels=tuple(sorted(labels, key=_by_number_then_name)),
        notes=tuple(notes),
    )


def _without(
    rows: dict[str, list[Any]], held: Mapping[str, list[Any]], what: str, name: str, notes: list[str]
) -> dict[str, list[Any]]:
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


def _whole(rows: Mapping[str, list[Any]]) -> "Dataset | None":
    return _take(rows, range(len(_texts(rows))))
