"""Classification of anything: one label an input, several, or a number.

Which one it is follows from the column: ``label`` has one name a row; ``labels`` several, or none; ``score`` a number
(regression). Several labels are yes-no questions that are asked side by side: logits [B, labels, 2], with 0 for no
beside the model's own logit for yes, so that cross-entropy and the divergence of distillation are those of each
question.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from layershare.errors import DataError
from layershare.tasks.encoding import batches
from layershare.tasks.files import label, labels, number
from layershare.tasks.masking import IGNORED
from layershare.tasks.reading import read_splits
from layershare.tasks.scores import METRICS, correlations
from layershare.tasks.task import Data, Evaluate, Outputs, Paths, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

COLUMNS: dict[str, tuple[str, ...]] = {
    "label": ("label", "labels", "class", "category", "target", "sentiment", "intent"),
    "labels": (),
    "score": (),
}
ANSWERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "label": ("single_label_classification", label),
    "labels": ("multi_label_classification", labels),
    "score": ("regression", number),
}
"""Role -> what transformers calls the problem, and how a cell is read."""


def read_answers(
    paths: Paths,
    *,
    candidates: Mapping[str, tuple[str, ...]],
    optional: frozenset[str],
    convert: Mapping[str, Callable[[Any], Any]] | None = None,
    columns: Mapping[str, str] | None = None,
    **how: Any,
) -> Data:
    """Inputs, of whose roles ``candidates`` and ``convert`` tell, with a label (a name or a whole number); the split
    keeps the share of each label. With a column that is given as ``labels`` there are several a row, with one given as
    ``score`` a number. ``how``: see :func:`~layershare.tasks.reading.read_splits`.
    """
    role = next((role for role in ("labels", "score") if role in (columns or {})), "label")
    try:
        data = read_splits(
            paths, candidates={**candidates, role: COLUMNS[role]}, columns=columns, optional=optional - {role},
            convert={**(convert or {}), role: ANSWERS[role][1]}, stratify="label", **how,
        )  # fmt: skip
    except DataError as error:
        raise DataError(error.message, _hint(error)) from None
    if role != "score" and len(data.labels) < (2 if role == "label" else 1):
        found = f"every row has the label {data.labels[0]!r}" if data.labels else "no row has a label"
        raise DataError(f"{data.files[0]}: {found}.", "Two or more are needed.")
    return data


def _hint(error: DataError) -> str:
    """How to say that a column has numbers, or several labels."""
    if "expected one label, found a list" in error.message:
        return "For several labels a text: --column labels=NAME."
    if "is not a label" in error.message:
        return "To predict numbers: --column score=NAME."
    return error.hint


def row_labels(keys: Sequence[Hashable], dataset: "Dataset", config: Any) -> list[Any]:
    """What is true of each different key, as :func:`truth` has it, in order of first occurrence; where equal inputs are
    said to have different labels, there is none; of different numbers it is the mean."""
    found: dict[Hashable, list[Any]] = {}
    for key, value in zip(keys, truth(dataset, config), strict=True):
        found.setdefault(key, []).append(value)
    answer = answer_of(dataset)
    if answer == "score":
        return [sum(values) / len(values) for values in found.values()]
    if answer == "label":
        return [values[0] if len(set(values)) == 1 else IGNORED for values in found.values()]
    return [
        [one[0] if len(set(one)) == 1 else float("nan") for one in zip(*values, strict=True)]
        for values in found.values()
    ]


def different(dataset: "Dataset", role: str, config: Any = None) -> "Dataset":
    """One row for each different image or sound, in the column ``role``; given a model's config, and where the data has
    them, with ``labels``."""
    keys = [one["sha256"] for one in dataset[role]]
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    rows = dataset.select_columns([role]).select([first[key] for key in dict.fromkeys(keys)])
    if config is not None and answer_of(dataset):
        rows = rows.add_column("labels", row_labels(keys, dataset, config))
    return rows


def truth(dataset: "Dataset", config: Any) -> list[Any]:
    """What is true of each row: the id of its label, or 0 or 1 for each of the model's labels, or a number."""
    answer = answer_of(dataset)
    if answer == "label":
        return label_ids(dataset["label"][:], config)
    if answer == "score":
        return list(dataset["score"][:])
    several = dataset["labels"][:]
    ids = label_ids([name for names in several for name in names], config)
    stream = iter(ids)
    true = [{next(stream) for _ in names} for names in several]
    return [[float(i in one) for i in range(config.num_labels)] for one in true]


def answer_of(dataset: "Dataset") -> str:
    """``label``, ``labels`` or ``score``, whichever the data has; "" for none."""
    return next((role for role in ANSWERS if role in dataset.column_names), "")


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
    """A model for another kind of problem, unknown labels in the data, or numbers that leave some of the model's out,
    raise DataError."""
    answer = next((role for role in ANSWERS if role in data.columns), "")
    wanted, own = ANSWERS[answer][0] if answer else None, getattr(config, "problem_type", None)
    if own is not None and wanted is not None and own != wanted:
        raise DataError(
            f"The column {data.columns[answer]!r} was read as {answer} ({wanted.replace('_', ' ')}), the model is for "
            f"{own.replace('_', ' ')}.",
            "Say what the column holds: --column label=, labels= or score=NAME.",
        )
    if answer == "labels" and own is None:
        raise DataError(
            f"The column {data.columns[answer]!r} has several labels a text, the model does not say that it has.",
            f"If it was trained to, set problem_type in its config.json to {wanted!r}; else train a new head for them.",
        )
    if answer == "score":
        if config.num_labels != 1:
            raise DataError(
                f"The model gives {config.num_labels} labels, the data has numbers.",
                "Give a model for regression (one label).",
            )
        return
    ids = label_ids(data.labels, config)
    if len(set(ids)) < len(ids):
        raise DataError(f"Two labels of the data mean the same to the model: {', '.join(data.labels)}.")
    numbered = all(name.isascii() and name.isdigit() for name in data.labels)
    if numbered and len(ids) != config.num_labels:  # by number, a wrong model would go unnoticed
        raise DataError(
            f"The data has {len(ids)} labels ({', '.join(data.labels)}), the model {config.num_labels}.",
            "Give the model that was trained on these labels.",
        )


def head(data: Data) -> dict[str, Any]:
    """The keys of a config for a new head on this data."""
    answer = next(role for role in ANSWERS if role in data.columns)
    names = dict(enumerate(data.labels or ("score",)))
    return {
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        "problem_type": ANSWERS[answer][0],
    }


def forward(
    model: "nn.Module",
    batch: "Mapping[str, Tensor]",
    *,
    hidden_states: bool = False,
    mask: "Callable[[nn.Module, Mapping[str, Tensor]], Tensor | None]" = lambda _, batch: batch.get(
        "attention_mask"
    ),
) -> Outputs:
    """Logits of a batch: [B, classes], [B, labels, 2] for several labels, [B, 1] for a number.

    ``mask``: (model, batch) -> where the hidden states are no padding.
    """
    import torch
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]

    out = model(**batch, output_hidden_states=hidden_states)
    inner = extract_model_from_parallel(model)
    several = getattr(inner.config, "problem_type", None) == ANSWERS["labels"][0]
    logits = torch.stack([torch.zeros_like(out.logits), out.logits], -1) if several else out.logits
    return Outputs(None, logits, out.hidden_states if hidden_states else (), mask(inner, batch))


def answers(task: Task, model: Any, processor: Any, rows: Any, *, batch_size: int = 64) -> list[Any]:
    """What the model says of each of these encoded rows, in the form of :func:`truth`; no gradients, and the model's
    mode is left as it was."""
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    result: dict[int, Any] = {}
    try:
        with torch.no_grad():
            for where, batch in batches(processor, rows, batch_size, task.collate, task.counts):
                inputs = {name: batch[name].to(device) for name in task.inputs if name in batch}
                logits = task.forward(model, inputs).logits
                assert logits is not None
                said = logits.squeeze(-1).float() if logits.shape[-1] == 1 else logits.argmax(-1)
                result |= dict(zip(where, said.tolist(), strict=True))
    finally:
        model.train(was_training)
    return [result[row] for row in range(len(result))]


class _Predict(Protocol):
    def __call__(
        self,
        model: Any,
        processor: Any,
        dataset: "Dataset",
        /,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> list[Any]: ...


def evaluator(predict: _Predict) -> Evaluate:
    """The ``evaluate`` of a task whose models ``predict`` an answer for each row, in the form of :func:`truth`."""

    def evaluate(
        model: Any,
        processor: Any,
        dataset: "Dataset",
        /,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        teacher: Any = None,
    ) -> dict[str, float]:
        """``accuracy``, ``macro_f1`` and ``matthews`` (Matthews 1975) of one label a row; ``macro_f1`` and ``accuracy``
        (of whole sets) of several; ``spearman`` and ``pearson`` of numbers. With ``teacher`` also ``agreement``: the
        share of equal answers, or the Pearson correlation with the teacher's numbers."""
        options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
        answer = answer_of(dataset)
        if not answer:
            raise DataError("The test data has no labels.", "Give rows with a label.")
        ours = predict(model, processor, dataset, **options)
        figures = METRICS[answer](truth(dataset, model.config), ours)
        if teacher is not None:
            theirs = ours if teacher is model else predict(teacher, processor, dataset, **options)
            same = sum(a == b for a, b in zip(theirs, ours, strict=True)) / len(ours)
            figures["agreement"] = correlations(theirs, ours)["pearson"] if answer == "score" else same
        return figures

    return evaluate


def metric_of(dataset: "Dataset") -> str:
    """``accuracy`` of one label a text, ``macro_f1`` of several, ``spearman`` of numbers."""
    return {"labels": "macro_f1", "score": "spearman"}.get(answer_of(dataset), "accuracy")
