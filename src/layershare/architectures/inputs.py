"""Inputs that a model of any kind can run on, made from its forward signature and its config."""

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

Inputs = dict[str, Any]
BATCH = 2
MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_values")


def find_inputs(model: PreTrainedModel) -> tuple[Inputs, list[Tensor]]:
    """The richest inputs (image with text before text alone) that the model runs on with finite results, and these.

    Raises the error of the first try if none does.
    """
    first: Exception | None = None
    for inputs in candidates(model):
        for _ in range(4):  # each time mended once more
            try:
                return inputs, _settled(model, inputs)
            except Exception as error:  # a model may raise anything on inputs it does not like
                first = first or error
                mended = mend(model, inputs, str(error))
                if mended is None:
                    break
                inputs = mended
    raise first or ValueError("nothing is known of the inputs it takes")


def _settled(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    outputs = run(model, inputs)
    if not finite(outputs):
        raise ValueError("its outputs are not finite, or it has none")
    if not same(outputs, run(model, inputs)):
        raise ValueError("its outputs change from run to run")
    return outputs


def finite(outputs: list[Tensor]) -> bool:
    return bool(outputs) and all(bool(output.isfinite().all()) for output in outputs)


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all bits are equal."""
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


@torch.no_grad()
def run(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """All floating-point tensors that the model returns, in order. Random numbers on the way are the same each time."""
    torch.manual_seed(0)
    return list(tensors(model(**inputs)))


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a model's output; caches are left out."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for name, value in output.items():
            if "past_key" not in name and "cache" not in name and "mems" not in name:
                yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    """Sets of inputs to try, the richest first."""
    known = inspect.signature(model.forward).parameters
    needed = {
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    text = _texts(model.config, known, needed)
    seen: list[Inputs] = [] if not text else [text]
    for media in _media(model, known):
        yield text | media
        if not text.keys() <= needed:
            seen.append(
                {name: value for name, value in text.items() if name in needed or name.startswith("decoder")}
                | media
            )
    yield from seen
    if isinstance(dummy := model.dummy_inputs, dict):
        yield {name: value for name, value in dummy.items() if name in known}


def has_media(model: PreTrainedModel, inputs: Inputs) -> bool:
    """Whether ``inputs`` hold images or sound, or the model takes none."""
    return any(name in inputs for name in MEDIA) or not any(
        name in inspect.signature(model.forward).parameters for name in MEDIA
    )


def mend(model: PreTrainedModel, inputs: Inputs, error: str) -> Inputs | None:
    """Other inputs, where the error says which: as many image tokens as features, as many frames as expected."""
    if found := re.search(r"tokens: ?(\d+),? *features:? *(?:torch.Size\(\[)?(\d+)", error, re.IGNORECASE):
        return _with_tokens(model, inputs, int(found[2]))
    if (found := re.search(r"length (\d+), but found (\d+)", error)) and "input_features" in inputs:
        features = inputs["input_features"]
        return inputs | {"input_features": _noise(*features.shape[:-1], int(found[1]))}
    if found := re.search(r"(?:missing|required)[^']*'(\w+)'", error):
        return None if found[1] in inputs else _guess(model, found[1], inputs)
    return None


def _guess(model: PreTrainedModel, name: str, inputs: Inputs) -> Inputs | None:
    """A value for an argument that the model asks for: masks are ones, the rest is noise as wide as the model."""
    if "mask" in name and inputs:
        akin = name.replace("_observed_mask", "_values").replace("features_mask", "features")
        like = inputs[akin] if akin in inputs else next(iter(inputs.values()))
        return inputs | {name: torch.ones(like.shape[:2], dtype=torch.long)}
    if name == "past_time_features" and "past_values" in inputs:
        return inputs | {
            name: _noise(*inputs["past_values"].shape[:2], getattr(model.config, "num_time_features", 1))
        }
    width = getattr(model.config, "hidden_size", None)
    return (
        inputs | {name: _noise(BATCH, 6, width)}
        if isinstance(width, int) and name.endswith(("embeds", "states"))
        else None
    )


def _with_tokens(model: PreTrainedModel, inputs: Inputs, features: int) -> Inputs | None:
    """Placeholders for media, as many as the model counts features (a batch has ``BATCH`` texts)."""
    wanted = "audio" if any("input_features" in name or "audio" in name for name in inputs) else "image"
    names = (f"{wanted}_token_id", f"{wanted}_token_index")
    token = next((v for name in names if isinstance(v := getattr(model.config, name, None), int)), None)
    if token is None or "input_ids" not in inputs or features % BATCH:
        return None
    ids = inputs["input_ids"]
    text = ids[:, -4:]
    return inputs | {"input_ids": torch.cat([torch.full((BATCH, features // BATCH), token), text], dim=1)}


def _texts(config: PretrainedConfig, known: Any, needed: set[str]) -> Inputs:
    found: Inputs = {}
    text = config.get_text_config()
    if "input_ids" in known:
        found["input_ids"] = _ids(text, 12)
    if "decoder_input_ids" in known and (config.is_encoder_decoder or "decoder_input_ids" in needed):
        found["decoder_input_ids"] = _ids(config.get_text_config(decoder=True), 6)
    if "bbox" in known:
        found["bbox"] = torch.zeros(BATCH, 12, 4, dtype=torch.long)
    if "attention_mask" in needed:
        found["attention_mask"] = torch.ones(BATCH, 12, dtype=torch.long)
    return found


def _ids(config: PretrainedConfig, length: int) -> Tensor:
    """Tokens that are no special ones."""
    vocabulary = getattr(config, "vocab_size", None)
    high = vocabulary if isinstance(vocabulary, int) and vocabulary > 1 else 32
    return torch.randint(high // 2, high, (BATCH, length), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _media(model: PreTrainedModel, known: Any) -> Iterator[Inputs]:
    if "hidden_states" in known and "grid_thw" in known:
        pixels, grid = next(_pixels(model.config, known))
        yield {"hidden_states": pixels} | grid
    if "pixel_values" in known:
        yield from ({"pixel_values": pixels} | extra for pixels, extra in _pixels(model.config, known))
    if "pixel_values_videos" in known and "pixel_values" not in known:
        yield from (
            {"pixel_values_videos": _noise(BATCH, 4, 3, side, side)} for side in (_side(model.config), 32)
        )
    if "input_features" in known:
        for shape in _feature_shapes(model.config):
            features: Inputs = {"input_features": _noise(*shape)}
            yield features
            if "input_features_mask" in known:
                yield features | {"input_features_mask": torch.ones(BATCH, max(shape[1:]), dtype=torch.long)}
    for name in ("input_values", "audio_values", "past_values", "spectrogram"):
        if name in known:
            for shape in _value_shapes(model.config):
                yield {name: _noise(*shape)}


def _pixels(config: PretrainedConfig, known: Any) -> Iterator[tuple[Tensor, Inputs]]:
    vision = getattr(config, "vision_config", config)
    channels = next(
        (
            c
            for n in ("num_channels", "in_channels", "in_chans")
            if isinstance(c := getattr(vision, n, None), int)
        ),
        3,
    )
    if "image_grid_thw" in known or "grid_thw" in known or "image_grid_hw" in known:
        patch, frames = getattr(vision, "patch_size", 8), getattr(vision, "temporal_patch_size", 1)
        name = next(n for n in ("image_grid_thw", "grid_thw", "image_grid_hw") if n in known)
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        yield (
            _noise(BATCH * 16, channels * frames * patch * patch),
            {name: grid[:, 1:] if name.endswith("_hw") else grid},
        )
        return
    side = _side(config)
    for size in dict.fromkeys((side, 64, 128, 224)):
        yield _noise(BATCH, channels, size, size), {}
        yield _noise(BATCH, getattr(config, "num_frames", 2) or 2, channels, size, size), {}
        yield _noise(BATCH, 1, channels, size, size), {"image_sizes": torch.tensor([[size, size]] * BATCH)}


def _side(config: PretrainedConfig) -> int:
    for owner in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(owner, "image_size", None)
        if isinstance(size, list | tuple) and size:
            size = size[0]
        if isinstance(size, int):
            return size
    return 64


def _feature_shapes(config: PretrainedConfig) -> Iterator[tuple[int, ...]]:
    owners = (config, getattr(config, "audio_config", None), getattr(config, "encoder_config", None))
    names = (
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "input_dim",
        "feature_size",
        "input_size",
    )
    bins = [v for o in owners for n in names if isinstance(v := getattr(o, n, None), int)] or [80]
    frames = [2 * v for o in owners if isinstance(v := getattr(o, "max_source_positions", None), int)]
    for size in dict.fromkeys(bins):
        for length in (*frames, 64):
            yield BATCH, size, length
            yield BATCH, length, size


def _value_shapes(config: PretrainedConfig) -> Iterator[tuple[int, ...]]:
    if lags := getattr(config, "lags_sequence", None):
        yield BATCH, config.context_length + max(lags)
    for name in ("context_length", "sequence_length"):
        if isinstance(length := getattr(config, name, None), int):
            yield BATCH, length, getattr(config, "num_input_channels", 1)
            yield BATCH, length
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if isinstance(bins, int):
        yield BATCH, length if isinstance(length, int) else 64, bins
    hop = math.prod(getattr(config, "conv_stride", None) or (320,))
    for samples in (8 * hop, 24 * hop):
        yield BATCH, samples
        yield BATCH, getattr(config, "audio_channels", 1) or 1, samples
