"""What pretraining begins with: a fresh model from a model type or a config file, or a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto as auto

from layershare.errors import ModelError, OptionError, nearest
from layershare.store.open import load_under_head, sketch
from layershare.tasks import causal_lm, masked_lm, span_corruption
from layershare.tasks.language import Objective

OBJECTIVES: dict[str, Objective] = {
    "masked": masked_lm.OBJECTIVE,
    "causal": causal_lm.OBJECTIVE,
    "span": span_corruption.OBJECTIVE,
}


@dataclass(frozen=True)
class Start:
    """``checkpoint``: the folder or hub name whose weights are gone on with, None for a fresh model.

    ``vocabulary``: the size asked for, None where nobody did.
    """

    name: str
    config: PretrainedConfig
    checkpoint: str | Path | None
    vocabulary: int | None

    @property
    def length(self) -> int | None:
        """The most positions that the model takes, as far as its config says."""
        return getattr(self.config, "max_position_embeddings", None) or None


def find_start(model: str | Path, overrides: Mapping[str, Any] | None = None) -> Start:
    """Understand ``model``: a model type (``bert``), a JSON file with a config, or else a checkpoint.

    ``overrides``: keys of a fresh config with other values; a checkpoint takes none. Where a model type is also the
    name of a checkpoint on the hub (``gpt2``), the type is meant; the checkpoint is ``openai-community/gpt2``.

    Raises OptionError for an unknown or ill-typed key, naming the nearest one, and ModelError.
    """
    path, overrides = Path(model).expanduser(), dict(overrides or {})
    if path.is_file() and path.suffix.lower() == ".json":
        values = _read_json(path)
        kind = values.pop("model_type", None)
        if kind not in CONFIG_MAPPING:
            raise ModelError(
                f"{model}: model_type {kind!r} is not known.", nearest(str(kind), CONFIG_MAPPING)
            )
        if "quantization_config" in values:
            raise ModelError(f"{model}: a fresh model cannot be quantized.", "A sharing plan is given apart.")
        return _fresh(str(kind), values, overrides, path.stem)
    if not path.is_dir() and str(model) in CONFIG_MAPPING:
        return _fresh(str(model), {}, overrides, str(model))
    if overrides:
        raise OptionError(
            f"{model} is a checkpoint, its {next(iter(overrides))} cannot be set.",
            "Settings are for a model type or a config file.",
        )
    try:
        found = sketch(model)
    except ModelError as error:
        if path.exists() or "/" in str(model):
            raise
        raise ModelError(
            f"{model} is neither a model type, a config file nor a checkpoint ({error.message}).",
            nearest(str(model), CONFIG_MAPPING) if len(str(model)) < 40 else "",
        ) from None
    return Start(path.name, found.config, model, None)


def objective_for(config: PretrainedConfig, wanted: str = "auto") -> str:
    """``masked``, ``causal`` or ``span``: what was ``wanted``, if the model type can, or what suits it.

    Encoder-decoders get spans; a type that has a masked head gets masks, unless its config says is_decoder; the
    others are causal. Raises OptionError.
    """
    kind = config.model_type
    can = {
        "masked": kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder,
        "causal": kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder,
        "span": kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder,
    }
    possible = [name for name, able in can.items() if able]
    if not possible:
        raise ModelError(
            f"{kind} has no language-modelling head in transformers.", "Choose another model type."
        )
    if wanted == "auto":
        decoder = getattr(config, "is_decoder", False) and "causal" in possible
        return "causal" if decoder else possible[0]
    if wanted not in possible:
        raise OptionError(f"Objective {wanted!r} is not for {kind}.", f"Valid: {', '.join(possible)}.")
    return wanted


def build(start: Start, objective: Objective, tokenizer: Any, seed: int) -> Any:
    """The model in float32, in evaluation mode; a fresh one is the same for the same seed.

    Raises ModelError where the tokenizer has more tokens than the model, or the config makes no model.
    """
    tokens = max(tokenizer.get_vocab().values()) + 1
    if start.checkpoint is not None:
        torch.manual_seed(seed)  # a head that the checkpoint lacks is drawn
        model: Any = load_under_head(start.checkpoint, objective.task.auto_class).float()
    else:
        config = _completed(start, tokenizer, tokens)
        torch.manual_seed(seed)
        try:
            model = getattr(transformers, objective.task.auto_class).from_config(config).float()
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise ModelError(f"{start.name}: no model can be made of this config ({why}).") from error
    known = model.get_input_embeddings().num_embeddings
    if known < tokens:
        raise ModelError(
            f"The tokenizer has {tokens} tokens, the model only {known}.",
            "Give the tokenizer that belongs to the model, or a fresh model.",
        )
    return model.eval()


def _completed(start: Start, tokenizer: Any, tokens: int) -> PretrainedConfig:
    """The config with the vocabulary and the special tokens of the tokenizer."""
    config = type(start.config).from_dict(start.config.to_dict())
    config.vocab_size = start.vocabulary or tokens
    if start.vocabulary is not None and start.vocabulary < tokens:
        raise ModelError(
            f"The tokenizer has {tokens} tokens, the config a vocab_size of {start.vocabulary}.",
            "Leave vocab_size out, or raise it.",
        )
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    start_with = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    found = {"pad_token_id": pad, "bos_token_id": start_with, "eos_token_id": end}
    if config.is_encoder_decoder:
        found["decoder_start_token_id"] = pad
        if getattr(config, "forced_eos_token_id", None) is not None:
            found["forced_eos_token_id"] = end
    for name in ("cls_token_id", "sep_token_id", "mask_token_id"):
        if hasattr(config, name):
            found[name] = getattr(tokenizer, name)
    for name, value in found.items():
        setattr(config, name, value)
    return config


def _fresh(kind: str, values: dict[str, Any], overrides: dict[str, Any], name: str) -> Start:
    make = CONFIG_MAPPING[kind]
    default = make()
    known = {**default.to_dict(), **{key: getattr(default, key, None) for key in default.attribute_map}}
    for key, value in overrides.items():
        if key not in known:
            raise OptionError(f"{kind} has no setting {key!r}.", nearest(key, known))
        if not _fits(value, known[key]):
            raise OptionError(f"{key} of {kind} is like {known[key]!r}, not {value!r}.")
    # Both spellings of one setting may occur, and a config takes the first it meets.
    renamed = {default.attribute_map.get(key, key): value for key, value in (values | overrides).items()}
    try:
        config = make.from_dict(renamed)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise OptionError(f"{name}: transformers refuses this config ({why}).") from error
    return Start(name, config, None, renamed.get("vocab_size"))


def _fits(value: Any, like: Any) -> bool:
    if like is None or value is None:
        return True
    if isinstance(like, bool):
        return isinstance(value, bool)
    if isinstance(like, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(like, int):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(like, (list, tuple)):
        return isinstance(value, (list, tuple))
    return isinstance(value, type(like))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable JSON file ({error}).") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: a {type(values).__name__} where a config was expected.")
    return values
