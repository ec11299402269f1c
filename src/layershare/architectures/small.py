"""A small random model of any model type, with inputs it runs on and the auto class that loads it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from layershare.architectures.inputs import Inputs, find_inputs, has_media
from layershare.architectures.shrink import small_configs
from layershare.errors import ModelError

# Classes that generate come first: they have the most laws to keep.
PREFERRED = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForCausalLM",
    "AutoModel",
)
AUTO = tuple(
    dict.fromkeys(
        (*PREFERRED, *(n for n in sorted(dir(transformers)) if n.startswith("AutoModelFor") and n[-1] != "_"))
    )
)
SETTINGS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1}
"""What generation needs and a default config may lack."""

PATIENCE = 6.0
"""Seconds of computing after which no further size is tried."""


@dataclass(frozen=True)
class Small:
    """A random model in evaluation mode, and how to run and load it."""

    model: PreTrainedModel
    inputs: Inputs
    auto_class: str

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def model_types() -> tuple[str, ...]:
    """All model types that some auto class knows; those of ``AutoModel`` first."""
    return tuple(dict.fromkeys(kind for auto in ("AutoModel", *AUTO) for kind in _names(auto)))


def auto_classes(model_type: str) -> tuple[str, ...]:
    """The auto classes that know ``model_type``, in the order of preference."""
    return tuple(auto for auto in AUTO if model_type in _names(auto))


def small_model(model_type: str, seed: int = 0) -> Small:
    """Raises ModelError with the first reason if no small config of this type builds and runs."""
    reason, classes, began = "", auto_classes(model_type), time.process_time()
    poor: Small | None = None  # runs, but on text alone although it also takes images or sound
    try:
        default = CONFIG_MAPPING[model_type]()
    except Exception as error:
        raise ModelError(
            f"{model_type}: its default config is refused by its own class ({error})."
        ) from error
    for config in small_configs(default):
        if time.process_time() - began > (PATIENCE / 3 if poor else PATIENCE):
            break
        for auto in dict.fromkeys((*classes[:2], *(name for name in classes if name == "AutoModel"))):
            try:
                model = _build(auto, config, seed)
                small = Small(model, find_inputs(model)[0], auto)
            except Exception as error:  # the next config or class may do
                reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            if has_media(model, small.inputs):
                return small
            poor = poor or small
    if poor is not None:
        return poor
    raise ModelError(
        f"{model_type}: no small model of it runs ({reason or 'its config refuses small values'})."
    )


def _build(auto: str, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config).eval()
    if model.can_generate():
        for name, value in SETTINGS.items():
            if getattr(model.generation_config, name, None) is None:
                setattr(model.generation_config, name, value)
    return model


def _names(auto: str) -> Iterator[str]:
    mapping = getattr(getattr(transformers, auto, None), "_model_mapping", None)
    return iter(mapping._model_mapping if mapping is not None else ())
