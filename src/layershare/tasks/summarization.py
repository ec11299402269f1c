"""Summarisation. Judged by ROUGE-1, -2 and -L (Lin 2004), as the package rouge-score computes them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from layershare.tasks import seq2seq
from layershare.tasks.task import Task

COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "document", "article", "body", "description", "dialogue", "content", "source"),
    "target": ("target", "summary", "highlights", "synopsis", "abstract", "title", "headline"),
}
KINDS = ("rouge1", "rouge2", "rougeL")


class Settings(seq2seq.Settings):
    """As :class:`layershare.tasks.seq2seq.Settings`, and how ROUGE is counted."""

    stemmer: bool = Field(False, description="Whether words are compared by their stems (English).")


def measure(stemmer: bool, written: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """The F-measures of each ROUGE, a mean over the texts, 0 to 100. Only letters a to z and digits count."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise seq2seq.needs("rouge-score", error) from None
    scorer = RougeScorer(KINDS, use_stemmer=stemmer)
    scores = [scorer.score(right, said) for said, right in zip(written, true, strict=True)]
    return {kind: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for kind in KINDS}


def configure(values: Mapping[str, Any]) -> Task:
    """The task with these :class:`Settings`."""
    settings = Settings.parse(values, where="summarization")
    return seq2seq.make(
        "summarization", COLUMNS, "rougeL", settings, partial(measure, settings.stemmer), configure
    )


TASK = configure({})
