"""A result as a self-contained HTML page and as a model card.  Importing it loads no torch."""

import os
from pathlib import Path

from layershare.report.card import model_card
from layershare.report.page import html
from layershare.result import Result, write_atomic

__all__ = ["html", "model_card", "write"]


def write(folder: str | os.PathLike) -> tuple[Path, Path]:
    """Reads ``result.json`` in ``folder``, writes ``report.html`` and ``README.md`` beside it, returns both.

    Raises:
        StoreError: there is no result in ``folder``, or it cannot be read.
    """
    folder = Path(folder)
    result = Result.load(folder / "result.json")
    page, card = html(result), model_card(result)
    return write_atomic(folder / "report.html", page), write_atomic(folder / "README.md", card)
