"""Batches cut into pieces whose answers fit in memory: the logits of a language model are wide."""

from collections.abc import Iterator

from torch import Tensor, nn

from layershare.sharing.statistics import Batch

LOGITS = 1 << 26
"""At most so many numbers in the logits of one piece (256 MB in float32), if one text alone has not more."""


def pieces(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """``batch`` in pieces of as many texts as give ``LOGITS`` logits, in order.

    A model without an output table over a vocabulary gets it whole, and so does one whose inputs do not all count
    texts in their first dimension.
    """
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    texts = {len(value) if value.ndim else 0 for value in inputs.values()}
    width = _tokens_out(model) * max(
        (value.shape[1] for value in inputs.values() if value.ndim > 1), default=1
    )
    if len(texts) != 1 or not width or (size := max(1, LOGITS // width)) >= max(texts):
        yield batch
        return
    for start in range(0, max(texts), size):
        yield {**batch, **{name: value[start : start + size] for name, value in inputs.items()}}


def _tokens_out(model: nn.Module) -> int:
    """The size of the vocabulary that the model's logits are over; 0 where there are none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else 0
