"""Where a batch is padded, for whatever a module is given: tokens, frames of a sound, tokens of a target."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
Mask = Callable[[Sequence[int]], Tensor | None]
"""The shape [B, T] of what is looked at, or [B * T] -> where it is no padding, boolean; None where all of it counts, or
nothing is known."""


def padding_of(model: nn.Module, batch: Mapping[str, Any]) -> Mask:
    """How ``batch`` is padded in ``model``, told by its ``attention_mask``, of tokens or of samples, and by the labels
    of an encoder-decoder, which are -100 behind their end."""
    masks: dict[tuple[int, ...], Tensor] = {}
    config, labels = getattr(model, "config", None), batch.get("labels")
    if getattr(config, "is_encoder_decoder", False) and isinstance(labels, Tensor) and labels.ndim > 1:
        target = labels != IGNORED
        if labels.ndim == 3:  # a spectrogram, of which one step of the decoder makes several frames
            together = getattr(config, "reduction_factor", 1)
            target = target[:, together - 1 :: together, 0]
        masks[tuple(target.shape)] = target
    known = batch.get("attention_mask")
    if isinstance(known, Tensor) and known.ndim == 2:
        if (frames := frames_of(model, known)) is not None:
            masks[tuple(frames.shape)] = frames
        masks[tuple(known.shape)] = known.bool()
    # Some models put the tokens of all texts in one row, as OPT before its feed-forward maps, or routers of experts.
    masks |= {(mask.numel(),): mask.flatten() for mask in masks.values()}
    return lambda shape: masks.get(tuple(shape))


def told_apart(batch: Mapping[str, Any], pad: int = 0) -> dict[str, Any]:
    """``batch``, with one more column of padding in its source where source and target are of one shape, so that their
    paddings are not taken for each other's."""
    made, labels, known = dict(batch), batch.get("labels"), batch.get("attention_mask")
    tokens = batch.get("input_ids")
    if not all(isinstance(one, Tensor) and one.ndim == 2 for one in (labels, known, tokens)):
        return made
    assert isinstance(labels, Tensor)
    assert isinstance(known, Tensor)
    if labels.shape == known.shape and not torch.equal(labels != IGNORED, known.bool()):
        made |= {
            name: torch.nn.functional.pad(made[name], (0, 1), value=value)
            for name, value in (("input_ids", pad), ("attention_mask", 0))
        }
    return made


def frames_of(model: nn.Module, mask: Tensor) -> Tensor | None:
    """[B, frames], true where the model hears sound, of a ``mask`` [B, samples]; None for a model whose convolutions do
    not shorten what it is given."""
    count = next(
        (found for m in model.modules() if (found := getattr(m, "_get_feat_extract_output_lengths", None))),
        None,
    )
    if count is None:
        return None
    # An adapter behind the layers would shorten them once more.
    how = {"add_adapter": False} if "add_adapter" in inspect.signature(count).parameters else {}
    given = mask.sum(1)
    heard, width = count(given, **how), count(torch.full_like(given, mask.shape[1]), **how)
    return torch.arange(int(width[0]), device=mask.device) < heard[:, None]


def rows_of(inputs: Tensor, mask: Mask | None = None) -> Tensor:
    """Inputs (..., in) as rows, without those of padding."""
    real = None if mask is None else mask(inputs.shape[:-1])
    return inputs.flatten(0, -2) if real is None else inputs[real]
