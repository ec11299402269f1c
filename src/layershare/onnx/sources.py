"""What a model reads: random token ids, pixels or sounds of the shape that its config says.  Loads no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from layershare.errors import ModelError

MAIN = ("input_ids", "pixel_values", "input_values", "input_features")
"""What a model may read: tokens, an image, samples (or a spectrogram), a spectrogram."""
DUAL = "dual-encoder"
"""The kind of model that has a tower for texts and one for images, as CLIP."""
MASKED = ("input_ids", "input_values")
"""Inputs whose rows may differ in length; the others have the length of the config."""


def source(config: Mapping[str, Any], name: str, batch: int, length: int) -> np.ndarray:
    """A random input ``name``, the same for equal configs: of ``length`` tokens, or of as many frames of a waveform.

    ``name`` is the model's main input: ``input_ids`` [B, T], ``pixel_values`` [B, channels, height, width],
    ``input_values`` (samples [B, T], or a spectrogram [B, frames, bins]) or ``input_features`` [B, bins, frames].
    Raises ModelError where the config does not tell its shape.
    """
    draw = np.random.default_rng(0)
    if name == "input_ids":
        high = min(_each(config, "vocab_size"))
        return draw.integers(high // 2, high, (batch, length))
    return draw.standard_normal((batch, *_shape(config, name, length))).astype(np.float32)


def is_dual(model: Any) -> bool:
    """Whether the model has a tower for texts and one for images, and generates nothing."""
    towers = all(hasattr(model, f"get_{side}_features") for side in ("text", "image"))
    return towers and not model.can_generate()


def _shape(config: Mapping[str, Any], name: str, length: int) -> tuple[int, ...]:
    if name == "pixel_values":
        size = _one(config, "image_size")
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return (next(_found(config, "num_channels"), 3), *sides)
    if name == "input_features":
        return _one(config, "num_mel_bins"), 2 * _one(config, "max_source_positions")
    if "conv_stride" in config:
        seen, step = 1, 1  # samples that a frame sees, and from one frame to the next
        for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
            seen, step = seen + (kernel - 1) * step, step * stride
        return (seen + step * (length - 1),)
    return _one(config, "max_length"), _one(config, "num_mel_bins")


def _found(config: Mapping[str, Any], key: str) -> Iterator[Any]:
    """Values of ``key``, in the config itself or in those of its parts."""
    if config.get(key) is not None:
        yield config[key]
        return
    for part in config.values():
        if isinstance(part, Mapping) and part.get(key) is not None:
            yield part[key]


def _each(config: Mapping[str, Any], key: str) -> list[Any]:
    if found := list(_found(config, key)):
        return found
    raise ModelError(f"The model's config names no {key}.")


def _one(config: Mapping[str, Any], key: str) -> Any:
    return _each(config, key)[0]
