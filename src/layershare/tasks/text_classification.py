"""Text classification: one label a text (or text pair), accuracy and macro-F1."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layershare.errors import DataError
from layershare.tasks.encoding import batches, encode, usable_length
from layershare.tasks.files import labels_of, texts_of
from layershare.tasks.reading import read_splits
from layershare.tasks.task import Data, Outputs, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "premise", "question", "content", "review", "document", "body"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "passage"),
    "label": ("label", "labels", "class", "category", "target", "sentiment", "intent"),
}


def read(
    paths: Sequence[str | Path] | str | Path,
    *,
    test: Sequence[str | Path] | str | Path = (),
    validation: Sequence[str | Path] | str | Path = (),
    columns: Mapping[str, str] | None = None,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Data:
    """Read texts with a label (a name or a whole number); the split keeps the share of each label.

    See :class:`~layershare.tasks.task.Task`. Labels stay names here; a model's config turns them into ids.
    """
    data = read_splits(
        paths,
        test,
        validation,
        candidates=COLUMNS,
        given=columns,
        optional=TASK.optional,
        convert={"text": texts_of, "text_pair": texts_of, "label": labels_of},
        stratify="label",
        split=split,
        seed=seed,
    )
    if len(data.labels) < 2:
        raise DataError(
            f"{data.files[0]}: every row has the label {data.labels[0]!r}.", "Two or more are needed."
        )
    return data


def texts(data: Data) -> list[str]:
    """The different training texts, in file order; of a pair, the first."""
    return [] if data.train is None else list(dict.fromkeys(data.train["text"]))


def encode_rows(tokenizer: Any, dataset: "Dataset", max_length: int) -> "Dataset":
    """One row of token ids for each different text (or text pair) of the split."""
    from datasets import Dataset

    rows = list(dict.fromkeys(_inputs(dataset)))
    return Dataset.from_dict(encode(tokenizer, [r[0] for r in rows], max_length, _second(rows)))


def row_labels(dataset: "Dataset", config: Any) -> list[int]:
    """The label id of each row of :func:`encode_rows`; -100 where equal texts have different labels."""
    found: dict[tuple[str, ...], int] = {}
    for text, label in zip(_inputs(dataset), label_ids(dataset["label"][:], config), strict=True):
        found[text] = label if found.get(text, label) == label else -100
    return list(found.values())


def label_ids(names: Sequence[str], config: Any) -> list[int]:
    """The ids that a model with this config gives to label names.

    A name is looked up in ``config.label2id``, first as it is, then without case; a number is an id of the
    model, when the model has no such name. An unknown label raises DataError and names the model's labels.
    """
    known = {str(name): int(i) for name, i in config.label2id.items()}
    folded = {name.casefold(): i for name, i in known.items()}
    ids = {}
    for name in dict.fromkeys(names):
        found = known.get(name, folded.get(name.casefold()))
        if found is None and name.isascii() and name.isdigit() and int(name) < config.num_labels:
            found = int(name)
        if found is None:
            raise DataError(
                f"The label {name!r} of the data is not one of the model's: {', '.join(known)}.",
                "Rename the labels in the data, or set id2label and label2id in the model's config.json.",
            )
        ids[name] = found
    return [ids[name] for name in names]


def check(data: Data, config: Any) -> None:
    """Unknown labels in the data, or numbers that leave some of the model's out, raise DataError."""
    ids = label_ids(data.labels, config)
    if len(set(ids)) < len(ids):
        raise DataError(f"Two labels of the data mean the same to the model: {', '.join(data.labels)}.")
    numbered = all(name.isascii() and name.isdigit() for name in data.labels)
    if numbered and len(ids) != config.num_labels:  # by number, a wrong model would go unnoticed
        raise DataError(
            f"The data has {len(ids)} labels ({', '.join(data.labels)}), the model {config.num_labels}.",
            "Give the model that was trained on these labels.",
        )


def forward(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """Logits [B, classes] of a padded batch."""
    out = model(**batch, output_hidden_states=hidden_states)
    return Outputs(None, out.logits, out.hidden_states if hidden_states else (), batch["attention_mask"])


def predict(
    model: Any, tokenizer: Any, dataset: "Dataset", *, batch_size: int = 64, max_length: int | None = None
) -> list[int]:
    """The model's label id for each row; no gradients, and the model's mode is left as it was."""
    import torch

    rows = _inputs(dataset)
    length = usable_length(tokenizer, model.config, max_length)
    encoded = encode(tokenizer, [row[0] for row in rows], length, _second(rows))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    result = [0] * len(rows)
    try:
        with torch.no_grad():
            for indices, batch in batches(tokenizer, encoded, batch_size):
                logits = forward(model, {k: v.to(device) for k, v in batch.items()}).logits
                assert logits is not None
                for index, label in zip(indices, logits.argmax(-1).tolist(), strict=True):
                    result[index] = label
    finally:
        model.train(was_training)
    return result


def evaluate(
    model: Any,
    tokenizer: Any,
    dataset: "Dataset",
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    teacher: Any = None,
) -> dict[str, float]:
    """``accuracy`` and ``macro_f1``; with ``teacher`` also ``agreement``, the share of equal predictions."""
    from sklearn.metrics import accuracy_score, f1_score

    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    truth = label_ids(dataset["label"][:], model.config)
    ours = predict(model, tokenizer, dataset, **options)
    figures = {
        "accuracy": float(accuracy_score(truth, ours)),
        "macro_f1": float(f1_score(truth, ours, average="macro", zero_division=0)),
    }
    if teacher is not None:
        theirs = ours if teacher is model else predict(teacher, tokenizer, dataset, **options)
        figures["agreement"] = float(accuracy_score(theirs, ours))
    return figures


def metric_of(dataset: "Dataset") -> str:  # noqa: ARG001 - the same call for every task
    """Always ``accuracy``: a row without a label is refused when the file is read."""
    return "accuracy"


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
    columns=COLUMNS,
    optional=frozenset({"text_pair"}),
    read=read,
    encode=encode_rows,
    texts=texts,
    check=check,
    forward=forward,
    evaluate=evaluate,
    metric_of=metric_of,
)
