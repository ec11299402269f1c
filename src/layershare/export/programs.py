"""What a model is as graphs: one for most, encoder and decoder for two, each with named tensors in and out.

The names are those that other runners of ONNX models know: ``past_key_values.0.key`` in, ``present.0.key`` out; in an
encoder-decoder ``past_key_values.0.encoder.key`` is what the decoder keeps of the source.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from layershare.errors import ModelError
from layershare.sharing.kv import ReadingLayer, owners

BATCH, LENGTH, PAST = 2, 5, 3  # of the traced example; a size of 1 would be taken for a constant


@dataclass(frozen=True)
class Program:
    """One graph to be: a module that takes and gives named tensors.

    Attributes:
        name: the stem of its file.
        example: tensors to trace it with; nested dicts where a name has dots.
        axes: like ``example``, with the dynamic axes of each tensor.
    """

    name: str
    module: nn.Module
    example: dict[str, Any]
    axes: dict[str, Any]


class _Named(nn.Module):
    """``model`` behind a function of named tensors. The parameters stay the objects that they are."""

    def __init__(self, model: PreTrainedModel, function: Callable[..., dict[str, Any]]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, **inputs: Any) -> dict[str, Any]:
        return self.function(self.model, **inputs)


def kind_of(model: PreTrainedModel) -> str:
    """``encoder`` or a key of ``OTHERS``. Raises ModelError for what is none of them."""
    name = type(model).__name__
    if model.main_input_name == "pixel_values":
        return "vision"
    if model.main_input_name != "input_ids":
        raise ModelError(f"{name} takes {model.main_input_name}: text and image models can be exported.")
    if not getattr(model.config, "is_encoder_decoder", False):
        return "decoder" if model.can_generate() and _takes(model, "past_key_values") else "encoder"
    if not model.can_generate():
        raise ModelError(
            f"{name} is an encoder-decoder without a head that generates, and cannot be exported."
        )
    return "encoder-decoder"


@torch.no_grad()
def programs(model: PreTrainedModel, names: Sequence[str] = ("attention_mask",)) -> list[Program]:
    """The graphs of ``model``. ``names``: what its tokenizer gives besides ``input_ids``. Raises ModelError."""
    kind = kind_of(model)
    return _encoder(model, names) if kind == "encoder" else OTHERS[kind](model)


def _encoder(model: PreTrainedModel, names: Sequence[str]) -> list[Program]:
    example = {"input_ids": _ids(LENGTH)}
    if "attention_mask" in names and _takes(model, "attention_mask"):
        example["attention_mask"] = torch.ones_like(example["input_ids"])
    if "token_type_ids" in names and _takes(model, "token_type_ids"):
        example["token_type_ids"] = torch.zeros_like(example["input_ids"])
    return [Program("model", _Named(model, _answer), example, dict.fromkeys(example, (0, 1)))]


def _vision(model: PreTrainedModel) -> list[Program]:
    size = model.config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (BATCH, model.config.num_channels, height, width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return [Program("model", _Named(model, _answer), {"pixel_values": pixels}, {"pixel_values": (0,)})]


def _decoder(model: PreTrainedModel) -> list[Program]:
    cache = model(input_ids=_ids(PAST), use_cache=True).past_key_values
    past, reads = _states(cache), owners(cache)
    example: dict[str, Any] = {
        "input_ids": _ids(LENGTH),
        "attention_mask": torch.ones(BATCH, PAST + LENGTH, dtype=torch.long),
        "position_ids": torch.arange(PAST, PAST + LENGTH).repeat(BATCH, 1),
        "past_key_values": past,
    }
    if not _takes(model, "position_ids"):
        del example["position_ids"]
    axes = dict.fromkeys(example, (0, 1)) | {"past_key_values": _axes(past)}

    def step(model: PreTrainedModel, past_key_values: dict, **inputs: Tensor) -> dict[str, Any]:
        out = model(**inputs, past_key_values=_cache(past_key_values, reads), use_cache=True)
        return {"logits": out.logits, "present": _states(out.past_key_values)}

    return [Program("model", _Named(model, step), example, axes)]


def _encoder_decoder(model: PreTrainedModel) -> list[Program]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    source = {"input_ids": _ids(LENGTH), "attention_mask": mask}
    cache = model(**source, decoder_input_ids=_ids(PAST), use_cache=True).past_key_values
    own, kept = _states(cache.self_attention_cache), _states(cache.cross_attention_cache)
    past = {layer: {"decoder": own[layer], "encoder": kept[layer]} for layer in own}
    target = {"input_ids": _ids(PAST), "encoder_attention_mask": mask, "past_key_values": past}
    axes = dict.fromkeys(target, (0, 1)) | {"past_key_values": _axes(past)}
    return [
        Program("encoder", _Named(model, _encode), source, dict.fromkeys(source, (0, 1))),
        Program("decoder", _Named(model, _decode), target, axes),
    ]


def _encode(model: PreTrainedModel, **inputs: Tensor) -> dict[str, Any]:
    # What the decoder keeps of the source depends on no decoded token: the rest of this step falls away.
    start = torch.zeros_like(inputs["input_ids"][:, :1])
    out = model(**inputs, decoder_input_ids=start, use_cache=True)
    kept = _states(out.past_key_values.cross_attention_cache)
    present = {layer: {"encoder": states} for layer, states in kept.items()}
    return {"last_hidden_state": out.encoder_last_hidden_state, "present": present}


def _decode(model: PreTrainedModel, past_key_values: dict, **inputs: Tensor) -> dict[str, Any]:
    own, kept = ({i: layer[side] for i, layer in past_key_values.items()} for side in ("decoder", "encoder"))
    mask = inputs["encoder_attention_mask"]
    # Only their batch and length are asked for: the keys and values of the source are in the cache.
    states = kept["0"]["key"].new_zeros(*mask.shape, model.config.hidden_size)
    out = model(
        encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=inputs["input_ids"],
        past_key_values=EncoderDecoderCache(_cache(own), _cache(kept)), use_cache=True,
    )  # fmt: skip
    own = _states(out.past_key_values.self_attention_cache)
    return {"logits": out.logits, "present": {i: {"decoder": states} for i, states in own.items()}}


def _answer(model: PreTrainedModel, **inputs: Tensor) -> dict[str, Tensor]:
    out = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if name in out:
            return {name: out[name]}
    raise ModelError(f"{type(model).__name__} gives neither logits nor a last_hidden_state.")


def _states(cache: Any) -> dict[str, dict[str, Tensor]]:
    """Keys and values by position, each [batch, heads, length, d]; without those that read another one's."""
    layers = {
        i: one for i, one in enumerate(getattr(cache, "layers", ())) if not isinstance(one, ReadingLayer)
    }
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers.values()):
        raise ModelError(
            "This model keeps more than keys and values from step to step: it cannot be exported."
        )
    return {str(i): {"key": layer.keys, "value": layer.values} for i, layer in layers.items()}


def _cache(
    states: dict[str, dict[str, Tensor]], reads: Mapping[int, int] = MappingProxyType({})
) -> DynamicCache:
    """A cache of ``states``, in which the positions in ``reads`` read those that these name."""
    cache = DynamicCache([(layer["key"], layer["value"]) for layer in states.values()])
    layers: list[Any] = cache.layers
    for position, owner in sorted(reads.items()):
        layers.insert(position, ReadingLayer(layers[owner], known=True))
    return cache


def _axes(states: Any) -> Any:
    if isinstance(states, Tensor):
        return (0, 2)
    return {name: _axes(inner) for name, inner in states.items()}


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _ids(length: int) -> Tensor:
    return torch.arange(BATCH * length).reshape(BATCH, length)


OTHERS: dict[str, Callable[[PreTrainedModel], list[Program]]] = {
    "decoder": _decoder,
    "encoder-decoder": _encoder_decoder,
    "vision": _vision,
}
