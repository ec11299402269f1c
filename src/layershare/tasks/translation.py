"""Translation. Judged by BLEU (Papineni et al. 2002) and chrF (Popovic 2015), as sacreBLEU computes them (Post 2018,
arXiv 1804.08771)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from layershare.errors import OptionError, nearest
from layershare.tasks import seq2seq
from layershare.tasks.task import Task

COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "source", "src", "input", "sentence1", "translation.en", "en"),
    "target": (
        "target",
        "translation",
        "tgt",
        "output",
        "sentence2",
        "translation.de",
        "translation.fr",
        "de",
        "fr",
    ),
}


class Settings(seq2seq.Settings):
    """As :class:`layershare.tasks.seq2seq.Settings`, and how BLEU is counted."""

    tokenize: str = Field("13a", description="sacreBLEU's tokenizer: 13a, intl, zh, char, none, ...")


def measure(tokenize: str, written: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """``bleu`` and ``chrf`` of all texts together, 0 to 100."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise seq2seq.needs("sacrebleu", error) from None
    if tokenize not in BLEU.TOKENIZERS:
        raise OptionError(f"sacreBLEU has no tokenizer {tokenize!r}.", nearest(tokenize, BLEU.TOKENIZERS))
    bleu = BLEU(tokenize=tokenize).corpus_score(list(written), [list(true)])
    return {"bleu": bleu.score, "chrf": CHRF().corpus_score(list(written), [list(true)]).score}


def configure(values: Mapping[str, Any]) -> Task:
    """The task with these :class:`Settings`."""
    settings = Settings.parse(values, where="translation")
    count = partial(measure, settings.tokenize)
    return seq2seq.make("translation", COLUMNS, "bleu", settings, count, configure)


TASK = configure({})
