"""Batches cut into pieces whose answers fit in memory: the logits of a language model are wide."""

from collections.abc import Iterator

from torch import Tensor, nn

from layershare.sharing.statistics import Batch, output_layer

LOGITS = 1 << 26
"""At most so many numbers in the logits of one piece (256 MB in float32), if one text alone has not more."""


def pieces(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """``batch`` in pieces of as many texts as give ``LOGITS`` logits, in order.

    A model without an output table over a vocabulary gets it whole, and so does one whose inputs do not all count
    texts in their first dimension.
    """
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    texts = {len(value) if value.ndim else 0 for value in inputs.values()}
    if len(texts) != 1 or (given := logits_of(model, batch)) <= LOGITS or (count := max(texts)) < 2:
        yield batch
        return
    size = max(1, LOGITS * count // given)
    for start in range(0, count, size):
        yield {**batch, **{name: value[start : start + size] for name, value in inputs.items()}}


def logits_of(model: nn.Module, batch: Batch) -> int:
    """How many numbers the logits of ``batch`` are, about; 0 where they are not over a vocabulary."""
    shapes = [value.shape for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    texts, tokens = (max((shape[i] for shape in shapes if len(shape) > i), default=1) for i in (0, 1))
    weight = getattr(output_layer(model), "weight", None)
    return texts * tokens * len(weight) if isinstance(weight, Tensor) else 0
