"""Text classification: one label a text (or text pair), several, or a number; see
:mod:`layershare.tasks.classification`."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from layershare.tasks import classification
from layershare.tasks.classification import answers, forward, head, metric_of
from layershare.tasks.encoding import encode, usable_length
from layershare.tasks.files import text
from layershare.tasks.task import Data, Task

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "premise", "question", "content", "review", "document", "body"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "passage"),
}


OPTIONAL = frozenset({"text_pair", "labels", "score"})
read = partial(
    classification.read_answers,
    candidates=TEXTS,
    optional=OPTIONAL,
    convert={"text": text, "text_pair": text},
)
"""Reads texts with their labels. Labels stay names here; a model's config turns them into ids."""


def texts(data: Data) -> list[str]:
    """The different training texts, in file order; of a pair, the first."""
    return [] if data.train is None else list(dict.fromkeys(data.train["text"]))


def encode_rows(tokenizer: Any, dataset: "Dataset", max_length: int, config: Any = None) -> "Dataset":
    """One row of token ids for each different text (or text pair) of the split; given a model's config, and where the
    data has them, with ``labels``."""
    from datasets import Dataset

    rows = list(dict.fromkeys(_inputs(dataset)))
    columns: dict[str, Any] = encode(tokenizer, [r[0] for r in rows], max_length, _second(rows))
    if config is not None and classification.answer_of(dataset):
        columns["labels"] = row_labels(dataset, config)
    return Dataset.from_dict(columns)


def row_labels(dataset: "Dataset", config: Any) -> list[Any]:
    """What is true of each row of :func:`encode_rows`."""
    return classification.row_labels(_inputs(dataset), dataset, config)


def predict(
    model: Any, tokenizer: Any, dataset: "Dataset", *, batch_size: int = 64, max_length: int | None = None
) -> list[Any]:
    """What the model says of each row, in the form of :func:`~layershare.tasks.classification.truth`."""
    rows = _inputs(dataset)
    length = usable_length(tokenizer, model.config, max_length)
    encoded = encode(tokenizer, [row[0] for row in rows], length, _second(rows))
    return answers(TASK, model, tokenizer, encoded, batch_size=batch_size)


evaluate = classification.evaluator(predict)


def _inputs(dataset: "Dataset") -> list[tuple[str, ...]]:
    """(text,) or (text, second text) of each row."""
    sides = [dataset[name][:] for name in ("text", "text_pair") if name in dataset.column_names]
    return list(zip(*sides, strict=True))


def _second(rows: Sequence[tuple[str, ...]]) -> list[str] | None:
    return [row[1] for row in rows] if rows and len(rows[0]) > 1 else None


TASK = Task(
    name="text-classification",
    auto_class="AutoModelForSequenceClassification",
    metric="accuracy",
    higher_is_better=True,
    columns=TEXTS | classification.COLUMNS,
    optional=OPTIONAL,
    read=read,
    encode=encode_rows,
    texts=texts,
    check=classification.check,
    forward=forward,
    evaluate=evaluate,
    metric_of=metric_of,
    learns=True,
    head=head,
)
