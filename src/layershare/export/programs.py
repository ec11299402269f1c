"""What a model is as graphs: one for most, two for encoder and decoder, or for texts and images; all of named tensors.

The names are those that other runners of ONNX models know: ``past_key_values.0.key`` in, ``present.0.key`` out; in an
encoder-decoder ``past_key_values.0.encoder.key`` is what the decoder keeps of the source.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from layershare.errors import ModelError
from layershare.onnx.sources import DUAL, MASKED, is_dual, source
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
    """``decoder``, ``encoder-decoder``, ``dual-encoder`` or a value of ``READS``. Raises ModelError for all others."""
    name, main, generates = type(model).__name__, model.main_input_name, model.can_generate()
    if is_dual(model):
        return DUAL
    if main not in READS:
        raise ModelError(f"{name} takes {main}: models of texts, images and sounds can be exported.")
    if getattr(model.config, "is_encoder_decoder", False) and (generates or main == "input_ids"):
        if not generates or not _takes(model, "decoder_input_ids"):
            raise ModelError(
                f"{name} is an encoder-decoder without a head that generates, and cannot be exported."
            )
        return "encoder-decoder"
    if main == "input_ids" and generates and _takes(model, "past_key_values"):
        return "decoder"
    return READS[main]


@torch.no_grad()
def programs(model: PreTrainedModel, names: Sequence[str] = ("attention_mask",)) -> list[Program]:
    """The graphs of ``model``. ``names``: what comes with its main input. Raises ModelError."""
    make = MAKERS.get(kind_of(model), _answering)
    return make(model, names)


def _answering(model: PreTrainedModel, names: Sequence[str]) -> list[Program]:
    example, axes = _source(model, names)
    return [Program("model", _Named(model, _answer), example, axes)]


def _dual_encoder(model: PreTrainedModel, names: Sequence[str]) -> list[Program]:
    texts, images = _source(model, names), _source(model, (), "pixel_values")
    return [
        Program("text", _Named(model, partial(_embed, "text")), *texts),
        Program("image", _Named(model, partial(_embed, "image")), *images),
    ]


def _embed(side: str, model: PreTrainedModel, **inputs: Tensor) -> dict[str, Tensor]:
    found = getattr(model, f"get_{side}_features")(**inputs)
    found = found if isinstance(found, Tensor) else found.pooler_output
    return {f"{side}_embeds": nn.functional.normalize(found, dim=-1)}


def _source(
    model: PreTrainedModel, names: Sequence[str], main: str | None = None
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """What the model reads as ``main``, as an example, and the dynamic axes of it."""
    main = main or model.main_input_name
    first = torch.from_numpy(source(model.config.to_dict(), main, BATCH, LENGTH))
    example = {main: _ids(LENGTH) if main == "input_ids" else first}
    ragged = main in MASKED and first.ndim == 2
    if ragged and "attention_mask" in names and _takes(model, "attention_mask"):
        example["attention_mask"] = torch.ones(first.shape, dtype=torch.long)
    if main == "input_ids" and "token_type_ids" in names and _takes(model, "token_type_ids"):
        example["token_type_ids"] = torch.zeros_like(example["input_ids"])
    return example, dict.fromkeys(example, (0, 1) if ragged else (0,))


def _decoder(model: PreTrainedModel, _: Sequence[str]) -> list[Program]:
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


def _encoder_decoder(model: PreTrainedModel, _: Sequence[str]) -> list[Program]:
    # A tokenizer may give no mask, yet texts of a batch are padded. Of sounds the decoder would need one of frames.
    read, source_axes = _source(model, ("attention_mask",) if model.main_input_name == "input_ids" else ())
    cache = model(**read, decoder_input_ids=_ids(PAST), use_cache=True).past_key_values
    own, kept = _states(cache.self_attention_cache), _states(cache.cross_attention_cache)
    past = {layer: {"decoder": own[layer], "encoder": kept[layer]} for layer in own}
    target = {"input_ids": _ids(PAST), "past_key_values": past}
    if "attention_mask" in read:
        target["encoder_attention_mask"] = read["attention_mask"]
    axes = dict.fromkeys(target, (0, 1)) | {"past_key_values": _axes(past)}
    return [
        Program("encoder", _Named(model, _encode), read, source_axes),
        Program("decoder", _Named(model, _decode), target, axes),
    ]


def _encode(model: PreTrainedModel, **inputs: Tensor) -> dict[str, Any]:
    # What the decoder keeps of the source depends on no decoded token: the rest of this step falls away.
    first = inputs[model.main_input_name]
    start = torch.zeros((first.shape[0], 1), dtype=torch.long)
    out = model(**inputs, decoder_input_ids=start, use_cache=True)
    kept = _states(out.past_key_values.cross_attention_cache)
    present = {layer: {"encoder": states} for layer, states in kept.items()}
    return {"last_hidden_state": out.encoder_last_hidden_state, "present": present}


def _decode(model: PreTrainedModel, past_key_values: dict, **inputs: Tensor) -> dict[str, Any]:
    own, kept = ({i: layer[side] for i, layer in past_key_values.items()} for side in ("decoder", "encoder"))
    mask, keys = inputs.get("encoder_attention_mask"), kept["0"]["key"]
    # Only their batch and length are asked for: the keys and values of the source are in the cache.
    width = getattr(model.config, "hidden_size", None) or model.config.encoder.hidden_size
    states = keys.new_zeros(keys.shape[0], keys.shape[2], width)
    out = model(
        encoder_outputs=(states,), decoder_input_ids=inputs["input_ids"], use_cache=True,
        past_key_values=EncoderDecoderCache(_cache(own), _cache(kept)),
        **({} if mask is None else {"attention_mask": mask}),
    )  # fmt: skip
    own = _states(out.past_key_values.self_attention_cache)
    return {"logits": out.logits, "present": {i: {"decoder": states} for i, states in own.items()}}


def _answer(model: PreTrainedModel, **inputs: Tensor) -> dict[str, Tensor]:
    out = model(**inputs)
    if "logits" in out:
        return {name: out[name] for name in ("logits", "pred_boxes") if name in out}
    if "last_hidden_state" in out:
        return {"last_hidden_state": out["last_hidden_state"]}
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


READS = {"input_ids": "encoder", "pixel_values": "vision", "input_values": "sound", "input_features": "sound"}
"""Main input -> the kind of a model that answers in one pass."""
MAKERS: dict[str, Callable[[PreTrainedModel, Sequence[str]], list[Program]]] = {
    "decoder": _decoder,
    "encoder-decoder": _encoder_decoder,
    DUAL: _dual_encoder,
}
