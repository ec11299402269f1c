"""From texts to padded batches of token ids. Pads by hand: no tokenizer warnings, other columns ignored."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layershare.tasks.masking import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def usable_length(tokenizer: Any, config: Any, max_length: int | None = None) -> int:
    """The longest text, in tokens, that tokenizer and model accept, at most ``max_length`` (default: 512). What reads
    no text has no limit of its own."""
    limits = [max_length or 512, getattr(tokenizer, "model_max_length", max_length or 512)]
    parts = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
    found = (getattr(part, "max_position_embeddings", None) for part in parts)
    positions = next((one for one in found if one), None)
    return min(*limits, positions) if positions else min(limits)


def encode(
    tokenizer: Any, texts: Sequence[str], max_length: int, pairs: Sequence[str] | None = None
) -> dict[str, list[list[int]]]:
    """Token ids of each text (or text pair), cut at ``max_length``, not padded: column -> one list a text."""
    both = (list(texts),) if pairs is None else (list(texts), list(pairs))
    encoded = tokenizer(*both, truncation=True, max_length=max_length, padding=False)
    return {name: encoded[name] for name in INPUTS if name in encoded}


def pad(tokenizer: Any, rows: Sequence[Mapping[str, Sequence[int]]]) -> "dict[str, Tensor]":
    """Rows of token ids and ``labels`` -> tensors [B, T] with T the longest row, padded on the right; of single labels
    [B].

    Also where the tokenizer pads on the left, which is for generating: a model with learned positions counts the
    padding there, so what it says of a text would depend on the texts beside it.
    """
    import torch

    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # decoders often have no padding token
    fill = {"input_ids": next(i for i in ids if i is not None), "labels": IGNORED}
    batch = {}
    for name in (*INPUTS, "labels"):
        if name not in rows[0]:
            continue
        values = [row[name] for row in rows]
        if isinstance(values[0], list):
            width = max(map(len, values))
            values = [[*value, *[fill.get(name, 0)] * (width - len(value))] for value in values]
        batch[name] = torch.tensor(values)
    return batch


def token_counts(rows: Any, config: Any = None) -> dict[Any, list[int]]:  # noqa: ARG001 - as for every task
    """The tokens of each input."""
    return {"source": [len(ids) for ids in rows["input_ids"]]}


def batches(
    processor: Any,
    rows: Any,
    batch_size: int,
    collate: "Callable[[Any, Sequence[Mapping[str, Any]]], dict[str, Tensor]]" = pad,
    counts: Callable[[Any], Mapping[Any, Sequence[int]]] = token_counts,
) -> "Iterator[tuple[list[int], dict[str, Tensor]]]":
    """(row numbers, padded batch) over all ``rows`` (a Dataset, or name -> column), longest first, so that little is
    padding. Rows are taken when their batch is made."""
    longest = lengths(counts(rows), rows)
    order = sorted(range(len(longest)), key=lambda i: -longest[i])
    for start in range(0, len(order), batch_size):
        where = order[start : start + batch_size]
        yield where, collate(processor, rows_at(rows, where))


def lengths(counts: Mapping[Any, Sequence[int]], rows: Any) -> Sequence[int]:
    """The length of each row's input; 0 where all are equally long. ``counts``: as a task gives it for ``rows``."""
    number = len(next(iter(rows.values()))) if isinstance(rows, Mapping) else len(rows)
    return counts.get("source", [0] * number)


def rows_at(rows: Any, where: Sequence[int]) -> list[dict[str, Any]]:
    """Some rows of a Dataset, or of name -> column."""
    if isinstance(rows, Mapping):
        return [{name: column[i] for name, column in rows.items()} for i in where]
    columns = rows[list(where)]
    return [{name: column[place] for name, column in columns.items()} for place in range(len(where))]
