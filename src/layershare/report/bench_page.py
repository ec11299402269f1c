"""What bench measured as one self-contained page: the table, and a chart of each kind of time."""

from importlib import resources
from pathlib import Path

from markupsafe import escape

from layershare.errors import OptionError
from layershare.measure.bench import Bench
from layershare.report import charts
from layershare.result import write_atomic


def check(file: Path) -> None:
    """Raise OptionError unless ``file`` can be a page or figures, by its ending."""
    if file.suffix not in (".html", ".json"):
        raise OptionError(f"{file}: the ending must be .html or .json.")


def save(bench: Bench, file: Path) -> None:
    """Write ``file``: a page (.html) or the figures (.json). Raises OptionError for another ending."""
    check(file)
    write_atomic(file, page(bench) if file.suffix == ".html" else bench.model_dump_json(indent=1) + "\n")


def page(bench: Bench) -> str:
    """HTML with its style and charts inside; nothing is loaded from elsewhere."""
    style = resources.files("layershare.report").joinpath("page.css").read_text(encoding="utf-8")
    kinds = (
        (f"One pass at batch 1, {bench.tokens} tokens", "latency"),
        ("One pass of the larger batch", "batch"),
        (f"Generating {bench.new} tokens", "decode"),
    )
    sections = []
    for title, name in kinds:
        found = [(row.label, getattr(row, name), charts.tone(place)) for place, row in enumerate(bench.rows)]
        if drawn := charts.time_bars([one for one in found if one[1] is not None], title):
            sections.append(f"<section><h2>{escape(title)}</h2>{drawn}</section>")
    notes = "".join(f'<p class="small">{escape(note)}</p>' for note in bench.notes())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>layershare bench</title><style>{style}</style>'
        f'<header><p class="eyebrow">{escape(bench.machine)}</p><h1>layershare bench</h1></header><main>'
        f'<section class="wide">{_table(bench)}{notes}</section>{"".join(sections)}</main></html>\n'
    )


def _table(bench: Bench) -> str:
    head, *rows = bench.cells()
    columns = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"
