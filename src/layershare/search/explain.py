"""Say why a plan was chosen: the best trials beside the presets at the same budget. Knows no torch."""

from collections.abc import Sequence
from typing import Any

from layershare.plan import SharingPlan
from layershare.result import Result, percent

SHOWN = 5
"""Best trials that are shown."""


def explain(result: Result) -> str:
    """A table of what was tried, and what follows from it, for a terminal."""
    tried = [one for one in result.trials if one["change"] is not None]
    refused = [one for one in result.trials if one["change"] is None and _fixed(one)]
    ranked = sorted(tried, key=lambda one: (one["change"], one["index"]))
    best, others = ranked[0], [one for one in ranked if _fixed(one)]
    auto = next((one for one in tried if one["name"] == "auto"), None)
    preset = next((one for one in others if one["name"] != "auto"), None)
    lines = [f"the best of {len(tried)} plans", "", *_rows(ranked[:SHOWN]), ""]
    lines += ["presets and auto at the same budget", "", *_rows(others)]
    lines += [f"  not possible: {one['name']} ({one['says']})" for one in refused]
    plan = SharingPlan.from_dict(best["plan"])
    said = [_against(best, one) for one in (auto, preset) if one is not None and one is not best]
    choice = "; ".join([f"chosen: trial {best['index']}, {_called(best)}", *filter(None, said)])
    return "\n".join([*lines, "", choice, "", plan.picture()])


def _fixed(trial: dict[str, Any]) -> bool:
    """Whether the trial is a preset or ``auto``."""
    return trial["fixed"]


def _rows(trials: Sequence[dict[str, Any]]) -> list[str]:
    head = f"  {'change':>9}  {'stored':>7}  {'model':>9}  trial"
    return [head, *map(_row, trials)]


def _row(one: dict[str, Any]) -> str:
    size = f"{percent(one['stored']):>7}  {one['bytes'] / 1e6:>6.1f} MB"
    return f"  {one['change']:>9.4g}  {size}  {one['index']}: {_called(one)}"


def _called(trial: dict[str, Any]) -> str:
    return trial["name"] or trial["says"]


def _against(best: dict[str, Any], other: dict[str, Any]) -> str:
    if best["change"] >= other["change"]:
        return f"no better than {other['name']}"
    return f"the answers move {percent(1 - best['change'] / other['change'])} less than with {other['name']}"
