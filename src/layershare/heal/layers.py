"""Whose hidden states are compared with whose, also between models of different depth and width."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layershare.errors import OptionError

LayerMap = Sequence[tuple[int, int]]
"""(student position, teacher position) pairs, counted from 0: whose output is compared with whose."""


def matching_layers(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Each student layer with the teacher layer at the same share of the depth; the last ones always match.

    >>> matching_layers(3, 6)
    [(0, 1), (1, 3), (2, 5)]
    """
    return [(i, max(0, round((i + 1) * teacher_layers / student_layers) - 1)) for i in range(student_layers)]


def kept_layers(kept: Sequence[int], teacher_layers: int) -> list[tuple[int, int]]:
    """The layer map of a student that has only the teacher's layers ``kept`` (ascending, from 0).

    The output of a kept layer is what the next kept layer reads; in the teacher that is the output of the
    layer just before that one. The last output is compared with the teacher's last.

    >>> kept_layers([0, 3, 5], 6)
    [(0, 2), (1, 4), (2, 5)]
    """
    reads = [layer - 1 for layer in kept[1:]]
    return list(enumerate([*reads, teacher_layers - 1]))


def depths(model: Any) -> tuple[int, ...]:
    """The number of layers; of an encoder-decoder those of the encoder and those of the decoder."""
    if not model.config.is_encoder_decoder:
        return (model.config.num_hidden_layers,)
    parts = (model.get_encoder(), model.get_decoder())
    return tuple(len(layer_list(part)) for part in parts)


def layer_list(part: nn.Module) -> nn.ModuleList:
    """The layers of an encoder or a decoder: its list with the most parameters, the first of equals. What goes before
    them may have a list of its own."""
    lists = [m for m in part.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))


def layer_pairs(student: Any, teacher: Any, given: LayerMap | None) -> LayerMap:
    """``given`` if it names layers that are there, or else :func:`matching_layers` of the two depths.

    In an encoder-decoder positions count through the encoder and on through the decoder.
    """
    ours, theirs = depths(student), depths(teacher)
    if given is None:
        starts = [(sum(ours[:part]), sum(theirs[:part])) for part in range(len(ours))]
        return [
            (first + i, second + j)
            for (first, second), pair in zip(starts, zip(ours, theirs, strict=True), strict=True)
            for i, j in matching_layers(*pair)
        ]
    for i, j in given:
        if not (0 <= i < sum(ours) and 0 <= j < sum(theirs)):
            raise OptionError(
                f"The layer map pairs student layer {i} with teacher layer {j}, "
                f"but the student has {sum(ours)} layers and the teacher {sum(theirs)}.",
                "Positions count from 0.",
            )
        if len(ours) > 1 and (i < ours[0]) != (j < theirs[0]):
            raise OptionError(f"The layer map pairs layers {i} and {j}, one of an encoder, one of a decoder.")
    return list(given)


@contextmanager
def projections(
    student: Any, teacher: Any, pairs: LayerMap, seed: int
) -> Iterator[list[Callable[[Tensor], Tensor]] | None]:
    """Within it, ``student`` has a linear map for each of these pairs of layers, from its hidden size to the teacher's
    (TinyBERT, Jiao et al. 2019, arXiv 1909.10351), trained and saved in checkpoints like its own weights; behind it
    they are gone. None where both models have one hidden size: nothing to map."""
    ours, theirs = student.config.hidden_size, teacher.config.hidden_size
    if ours == theirs or not pairs:
        yield None
        return
    draw, device = torch.Generator().manual_seed(seed), next(student.parameters()).device
    weights = [
        nn.Parameter((torch.randn(theirs, ours, generator=draw) / ours**0.5).to(device)) for _ in pairs
    ]
    student.layershare_projections = nn.ParameterList(weights)
    try:
        yield [partial(functional.linear, weight=weight) for weight in weights]
    finally:
        del student.layershare_projections
