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


def parts_of(model: Any) -> tuple[nn.Module, ...]:
    """What has layers of its own, in the order of the hidden states: encoder and decoder, or a tower for images and one
    for texts, or the whole model."""
    if model.config.is_encoder_decoder:
        return model.get_encoder(), model.get_decoder()
    return (model.vision_model, model.text_model) if has_towers(model) else (model,)


def has_towers(model: Any) -> bool:
    """Whether images and texts are read side by side, each by layers of their own."""
    return hasattr(model, "vision_model") and hasattr(model, "text_model")


def depths(model: Any) -> tuple[int, ...]:
    """The number of layers; of an encoder-decoder, or of two towers, those of each."""
    parts = parts_of(model)
    if len(parts) == 1:
        return (model.config.num_hidden_layers,)
    return tuple(len(layer_list(part)) for part in parts)


def layer_list(part: nn.Module) -> nn.ModuleList:
    """The layers of a part of a model: its list with the most parameters, the first of equals. What goes before
    them may have a list of its own."""
    lists = [m for m in part.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))


def widths(config: Any) -> tuple[int, ...]:
    """The hidden size; where parts have configs of their own, that of each."""
    if hasattr(config, "hidden_size"):
        return (config.hidden_size,)
    names = ("vision_config", "text_config") if hasattr(config, "vision_config") else ("encoder", "decoder")
    return tuple(getattr(config, name).hidden_size for name in names)


def layer_pairs(student: Any, teacher: Any, given: LayerMap | None) -> LayerMap:
    """``given`` if it names layers that are there, or else :func:`matching_layers` of the two depths.

    In an encoder-decoder positions count through the encoder and on through the decoder; in two towers through that of
    images and on through that of texts.
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
            raise OptionError(
                f"The layer map pairs layers {i} and {j}, which are of different parts of the models."
            )
    return list(given)


@contextmanager
def projections(
    student: Any, teacher: Any, pairs: LayerMap, seed: int
) -> Iterator[list[Callable[[Tensor], Tensor]] | None]:
    """Within it, ``student`` has a linear map for each of these pairs of layers, from its hidden size to the teacher's
    (TinyBERT, Jiao et al. 2019, arXiv 1909.10351), trained and saved in checkpoints like its own weights; behind it
    they are gone. None where both models have one hidden size: nothing to map."""
    if not pairs or widths(student.config) == widths(teacher.config):
        yield None
        return
    if len(widths(student.config)) > 1:
        raise OptionError(
            f"Hidden states of widths {widths(student.config)} and {widths(teacher.config)} cannot be compared.",
            "Set weights.hidden to 0.",
        )
    ours, theirs = student.config.hidden_size, teacher.config.hidden_size
    draw, device = torch.Generator().manual_seed(seed), next(student.parameters()).device
    weights = [
        nn.Parameter((torch.randn(theirs, ours, generator=draw) / ours**0.5).to(device)) for _ in pairs
    ]
    student.layershare_projections = nn.ParameterList(weights)
    try:
        yield [partial(functional.linear, weight=weight) for weight in weights]
    finally:
        del student.layershare_projections
