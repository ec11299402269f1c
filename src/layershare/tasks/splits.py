"""Splitting rows so that no text stands on both sides. Pure Python."""

import random
from collections.abc import Hashable, Sequence

from layershare.errors import DataError, OptionError


def text_key(text: str) -> str:
    """What makes two texts equal for a split: the same words, whatever their case and spacing."""
    return " ".join(text.split()).casefold()


def leaks(rows: Sequence[Sequence[str]], held_out: Sequence[Sequence[str]]) -> list[int]:
    """The indices of the rows that have a text in common with the rows held out."""
    keys = {text_key(text) for row in held_out for text in row}
    return [i for i, row in enumerate(rows) if any(text_key(text) in keys for text in row)]


def split_rows(
    rows: Sequence[Sequence[str]],
    fractions: Sequence[float],
    seed: int,
    strata: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Share the rows out, seeded, in the given ``fractions``; the first part takes what is left over.

    Rows that share a text, directly or through other rows, stay together: a pair (a, b) drags every row with
    a or b into the same part. Groups too big for the later parts go to the first. With ``strata`` (one value
    a row, the label) each value is shared out on its own. Returns the row indices of each part, ascending.

    Raises OptionError for fractions that are negative or do not sum to 1, and DataError when a part whose
    fraction is above 0 gets no row.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] <= 0:
        raise OptionError(
            f"The split {tuple(fractions)} is not a division of the data.", "Use e.g. (0.8, 0.1, 0.1)."
        )
    groups: dict[Hashable, list[list[int]]] = {}
    for group in _connected(rows):
        groups.setdefault(None if strata is None else strata[group[0]], []).append(group)
    rng = random.Random(seed)
    parts: list[list[int]] = [[] for _ in fractions]
    for members in groups.values():
        rng.shuffle(members)
        total = sum(map(len, members))
        quotas = [round(fraction * total) for fraction in fractions]
        for group in members:
            # The later, small parts are filled first, the emptiest before the others, so that none starves.
            fits = [i for i in range(1, len(parts)) if len(group) <= quotas[i]]
            target = max(fits, key=lambda i: quotas[i] / fractions[i]) if fits else 0
            quotas[target] -= len(group)
            parts[target].extend(group)
    for name, fraction, part in zip(("training", "validation", "test"), fractions, parts, strict=False):
        if fraction > 0 and not part:
            raise DataError(
                f"{len(rows)} rows are too few, or share too many texts, to set some aside for {name}.",
                "Give more data, or a separate test file.",
            )
    return [sorted(part) for part in parts]


def _connected(rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Rows grouped by shared texts (union-find over the texts), in order of first occurrence."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [[text_key(text) for text in row] for row in rows]
    for first, *others in keys:
        for other in others:
            parent[find(other)] = find(first)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(keys):
        groups.setdefault(find(row[0]), []).append(i)
    return list(groups.values())
