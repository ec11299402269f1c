"""Token classification: a tag for each word. Entities are judged by F1, as conlleval and seqeval count them (Tjong Kim
Sang, De Meulder 2003; Ramshaw, Marcus 1995), other tags by accuracy.

A word is asked for at its first piece. Which piece belongs to which word is told by offsets, so any fast tokenizer
will do.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from layershare.errors import DataError, ModelError
from layershare.tasks.classification import label_ids
from layershare.tasks.encoding import INPUTS, batches, usable_length
from layershare.tasks.files import words
from layershare.tasks.masking import IGNORED
from layershare.tasks.reading import read_splits
from layershare.tasks.task import Data, Outputs, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

COLUMNS: dict[str, tuple[str, ...]] = {
    "words": ("words", "tokens", "text", "sentence"),
    "tags": ("tags", "ner_tags", "labels", "label", "pos_tags", "chunk_tags", "pos", "ner"),
}
OUTSIDE = "O"


read = partial(
    read_splits, candidates=COLUMNS, convert={"words": words, "tags": words}, equal=("words", "tags")
)
"""Reads words and as many tags: lists, or texts with spaces between."""


def texts(data: Data) -> list[str]:
    """The different training texts, in file order."""
    return [] if data.train is None else list(dict.fromkeys(map(" ".join, data.train["words"])))


def encode(tokenizer: Any, dataset: "Dataset", max_length: int, config: Any = None) -> "Dataset":
    """One row a text; ``labels`` are the ids of the tags at the first piece of each word, -100 elsewhere."""
    from datasets import Dataset

    columns, firsts = pieces(tokenizer, dataset["words"][:], max_length)
    if config is not None and "tags" in dataset.column_names:
        rows = dataset["tags"][:]
        ids = dict.fromkeys(tag for tags in rows for tag in tags)
        ids = dict(zip(ids, label_ids(list(ids), config), strict=True))
        columns["labels"] = []
        for tags, first, tokens in zip(rows, firsts, columns["input_ids"], strict=True):
            labels = [IGNORED] * len(tokens)
            for word, place in first.items():
                labels[place] = ids[tags[word]]
            columns["labels"].append(labels)
    return Dataset.from_dict(columns)


def pieces(
    tokenizer: Any, rows: Sequence[Sequence[str]], max_length: int
) -> tuple[dict[str, list[Any]], list[dict[int, int]]]:
    """(columns of token ids, for each row: number of a word -> place of its first piece); words behind
    ``max_length`` tokens have none."""
    if not tokenizer.is_fast:
        raise ModelError(
            "The tokenizer does not tell which piece belongs to which word.",
            "It takes a fast one (tokenizer.json).",
        )
    encoded = tokenizer(
        [" ".join(row) for row in rows], truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    firsts: list[dict[int, int]] = []
    for row, offsets in zip(rows, encoded["offset_mapping"], strict=True):
        owner = [word for word, text in enumerate(row) for _ in f"{text} "]
        first: dict[int, int] = {}
        spaces = {place for place, letter in enumerate(" ".join(row)) if letter == " "}
        for place, (start, end) in enumerate(offsets):
            # Some tokenizers count the space in front of a word to it: so it is the last letter that tells.
            if end > start and end - 1 not in spaces:
                first.setdefault(owner[end - 1], place)
        firsts.append(first)
    return {name: encoded[name] for name in INPUTS if name in encoded}, firsts


def check(data: Data, config: Any) -> None:
    """A tag of the data that the model does not know raises DataError."""
    label_ids(data.labels, config)


def head(data: Data) -> dict[str, Any]:
    """The keys of a config for a new head on this data."""
    names = dict(enumerate(data.labels))
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def forward(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """Logits [B, T, tags] of a padded batch."""
    out = model(**batch, output_hidden_states=hidden_states)
    states = out.hidden_states if hidden_states else ()
    return Outputs(None, out.logits, states, batch["attention_mask"], along="source")


def predict(
    model: Any, tokenizer: Any, dataset: "Dataset", *, batch_size: int = 64, max_length: int | None = None
) -> list[list[str]]:
    """The model's tag for each word; ``O`` for words behind what it can read. No gradients; the model's mode stays."""
    import torch

    rows = dataset["words"][:]
    encoded, firsts = pieces(tokenizer, rows, usable_length(tokenizer, model.config, max_length))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    result = [[OUTSIDE] * len(row) for row in rows]
    try:
        with torch.no_grad():
            for indices, batch in batches(tokenizer, encoded, batch_size):
                logits = forward(model, {k: v.to(device) for k, v in batch.items()}).logits
                assert logits is not None
                for index, said in zip(indices, logits.argmax(-1).tolist(), strict=True):
                    for word, place in firsts[index].items():
                        result[index][word] = model.config.id2label[said[place]]
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
    """``accuracy`` of the words' tags, and where there are entities ``f1``, ``precision`` and ``recall`` of whole ones;
    with ``teacher`` also ``agreement``, the share of words with equal tags."""
    if not len(dataset) or "tags" not in dataset.column_names:
        raise DataError("The test data has no tags.")
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    names = model.config.id2label
    true = [[names[i] for i in label_ids(tags, model.config)] for tags in dataset["tags"][:]]
    ours = predict(model, tokenizer, dataset, **options)
    figures = entity_scores(true, ours) if metric_of(dataset) == "f1" else {}
    figures["accuracy"] = _equal(true, ours)
    if teacher is not None:
        theirs = ours if teacher is model else predict(teacher, tokenizer, dataset, **options)
        figures["agreement"] = _equal(theirs, ours)
    return figures


def _equal(rows: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> float:
    pairs = [pair for one, other in zip(rows, others, strict=True) for pair in zip(one, other, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def entity_scores(true: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> dict[str, float]:
    """``f1``, ``precision`` and ``recall`` over all entities; one is right if its kind, first and last word are."""
    wanted, found = (
        {(row, *one) for row, tags in enumerate(rows) for one in entities(tags)} for rows in (true, said)
    )
    right = len(wanted & found)
    precision, recall = right / len(found) if found else 0.0, right / len(wanted) if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first word, last word) of each entity in IOB1, IOB2, IOE, IOBES or BILOU tags, read leniently, as
    conlleval does: an I behind another kind, or behind nothing, begins an entity.

    >>> entities(["B-PER", "I-PER", "O", "I-LOC"])
    [('PER', 0, 1), ('LOC', 3, 3)]
    """
    found: list[tuple[str, int, int]] = []
    open_kind, start, ended = "", 0, True
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, kind = tag.partition("-") if "-" in tag else ("", "", "" if tag == OUTSIDE else tag)
        if not ended and (prefix in ("B", "S", "U") or kind != open_kind):
            found.append((open_kind, start, place - 1))
            ended = True
        if kind and ended:
            open_kind, start, ended = kind, place, False
        if not ended and prefix in ("E", "L", "S", "U"):
            found.append((open_kind, start, place))
            ended = True
    return found


def metric_of(dataset: "Dataset") -> str:
    """``f1`` where some words are outside of all entities (``O``), ``accuracy`` where every word has its own tag."""
    return "f1" if any(OUTSIDE in tags for tags in dataset["tags"][:]) else "accuracy"


TASK = Task(
    name="token-classification",
    auto_class="AutoModelForTokenClassification",
    metric="f1",
    higher_is_better=True,
    columns=COLUMNS,
    optional=frozenset(),
    read=read,
    encode=encode,
    texts=texts,
    check=check,
    forward=forward,
    evaluate=evaluate,
    metric_of=metric_of,
    learns=True,
    head=head,
)
