"""From rows to a section of the page: one table, and who is ahead at each budget."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quality.peers import OURS, SIDES
from quality.subject import Subject

Row = dict[str, Any]


def section(subject: Subject, rows: Sequence[Row], title: str, told: Iterable[str], ending: str) -> str:
    whole = next(row for row in rows if row["side"] == "original")
    figures = {key: head for key, head in subject.figures.items() if all(key in row for row in rows)}
    heads = [*figures.values(), "MB on disk", "processor s"]
    lines = [
        f"## Quality: {title}",
        "",
        *(line.format(subject=subject, **whole) for line in subject.told),
        *told,
        "",
        f"| budget | | stored | {' | '.join(heads)} |",
        f"|---:|---|---:|{'---:|' * len(heads)}",
    ]
    budgets = sorted({row["budget"] for row in rows} - {1.0}, reverse=True)
    for budget in budgets:
        sides = sorted({row["side"] for row in rows if row["budget"] == budget}, key=order)
        lines += [line(subject, figures, budget, side, of(rows, side, budget), whole) for side in sides]
    ours = [side for side in SIDES if side.startswith(OURS)]
    verdicts = [verdict(subject, figures, rows, budget, whole, side) for budget in budgets for side in ours]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return "\n".join([*lines, "", *filter(None, verdicts), "", f"Commits: {commits}.", "", ending, ""])


def order(side: str) -> int:
    return list(SIDES).index(side) if side in SIDES else len(SIDES)


def of(rows: Iterable[Row], side: str, budget: float) -> list[Row]:
    return [row for row in rows if (row["side"], row["budget"]) == (side, budget)]


def line(
    subject: Subject, figures: Iterable[str], budget: float, side: str, rows: Sequence[Row], whole: Row
) -> str:
    values = [shown(subject, key, rows, whole) for key in figures]
    stored = rows[0]["stored"] / whole["stored"]
    seconds = statistics.median(row["cpu"] for row in rows)
    cells = [*values, f"{rows[0]['bytes'] / 1e6:.1f}" if rows[0]["bytes"] else "", f"{seconds:.0f}"]
    return f"| {budget:.0%} | {side} | {stored:.1%} | {' | '.join(cells)} |"


def shown(subject: Subject, key: str, rows: Sequence[Row], whole: Row) -> str:
    """The mean, and from lowest to highest where there are several seeds."""
    values = [value(subject, key, row, whole) for row in rows]
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if statistics.mean(values) < 1000 else f"{values[0]:.3g}"


def value(subject: Subject, key: str, row: Row, whole: Row) -> float:
    """Per cent of the original's figure where more is better; else the figure itself."""
    return 100 * row[key] / whole[key] if subject.better(key) else row[key]


def verdict(
    subject: Subject, figures: Mapping[str, str], rows: Sequence[Row], budget: float, whole: Row, side: str
) -> str:
    """Plainly whether this side of ours is ahead of every peer in each figure, among those that keep the budget."""
    sides = {row["side"] for row in rows if row["budget"] == budget}
    fit = [s for s in sides if of(rows, s, budget)[0]["stored"] <= 1.011 * budget * whole["stored"]]
    said = []
    for key, head in figures.items():
        sign = 1 if subject.better(key) else -1  # more of it is better
        found = {s: [sign * value(subject, key, row, whole) for row in of(rows, s, budget)] for s in fit}
        mine = found.get(side)
        found = {peer: values for peer, values in found.items() if not peer.startswith(OURS)}
        if mine is None or not found:
            continue
        means = {peer: statistics.mean(values) for peer, values in found.items()}
        best, mean = max(means, key=means.__getitem__), statistics.mean(mine)
        what = "ahead of every peer" if mean > means[best] else f"**behind {best}**"
        if mean > means[best] and min(mine) <= max(map(max, found.values())):
            what += ", by less than the seeds differ"
        said.append(f"{head} {what} ({abs(mean):.1f}; best peer {abs(means[best]):.1f}, {best})")
    return f"- {budget:.0%}: {side}: {'; '.join(said)}." if said else ""
