"""What verbs share: their answer, and how they read and print small things."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import typer

from layershare.errors import OptionError


class Shown(NamedTuple):
    """What a verb answers: ``text`` for people, ``data`` for ``--json``."""

    text: str
    data: Any


def note(text: str) -> None:
    """Tell the user something that is not the answer."""
    typer.echo(text, err=True)


def words(parts: str | None) -> list[str] | None:
    """``"attention,ffn"`` -> ``["attention", "ffn"]``."""
    return parts.split(",") if parts else None


def columns(pairs: list[str] | None) -> dict[str, str] | None:
    """``["text=review"]`` -> ``{"text": "review"}``."""
    for pair in pairs or ():
        if "=" not in pair:
            raise OptionError(
                f"--column {pair} is not of the form ROLE=NAME.", "For example: --column text=review"
            )
    return dict(pair.split("=", 1) for pair in pairs) if pairs else None


def values(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """``["hidden_size=64", "weights.hidden=0"]`` -> ``{"hidden_size": 64, "weights": {"hidden": 0}}``.

    What is not JSON is a text.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        *path, last = key.split(".")
        if not (equals and all([*path, last])):
            raise OptionError(f"{option} {pair} is not of the form KEY=VALUE.")
        at = found
        for step in path:
            at = at.setdefault(step, {})
            if not isinstance(at, dict):
                raise OptionError(f"{option} {pair}: {step} has a value already.")
        try:
            at[last] = json.loads(value)
        except ValueError:
            at[last] = value
    return found


def task_of(name: str, settings: list[str] | None, skip_bad: bool) -> Any:
    """The task as it is set."""
    from layershare.tasks import get_task

    return get_task(name, values(settings, "--task-set"), skip_bad=skip_bad)


def part(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Take the settings ``name.KEY`` out of what :func:`values` found."""
    taken = found.pop(name, {})
    if not isinstance(taken, dict):
        raise OptionError(f"--set {name} has settings of its own.", f"For example: --set {name}.KEY=VALUE")
    return taken


def files(path: Path | None) -> list[Path]:
    """An option that may be left out, as a list."""
    return [] if path is None else [path]


def made(result: Any, out: Path) -> Shown:
    """What a verb that trains made, and where it is."""
    return Shown(f"{result.table()}\n\nSaved in {out}", result.model_dump(mode="json"))


def saved(out: Path) -> str:
    """Where a whole run left its things."""
    return f"Saved in {out}; the report is {out / 'report.html'}"


def account(student: Any, folder: Path) -> Shown:
    """Verify a shared model, and tell what is tied."""
    from layershare import plan_of, verify

    checked, plan = verify(student), plan_of(student)
    assert plan is not None  # or verify would have said so
    data = {"folder": str(folder), "plan": plan.to_dict(), "account": asdict(checked)}
    return Shown(f"{plan.picture()}\n\n{checked}", data)
