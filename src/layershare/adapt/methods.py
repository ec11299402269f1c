"""adapt and load: from a model to a PeftModel, the same for every method."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layershare.adapt import guard
from layershare.adapt.base import check, fingerprint, frozen_view, read
from layershare.adapt.config import AdaptConfig
from layershare.adapt.places import ends, groups, places
from layershare.errors import DependencyError, ModelError, OptionError, StoreError
from layershare.plan import SharingPlan
from layershare.stacks import find_stacks


def adapt(model: Any, config: AdaptConfig | None = None, *, plan: SharingPlan | None = None) -> Any:
    """A ``peft.PeftModel``: ``model``, frozen, with the small trainable modules that ``config`` describes.

    Only they, and a task head, are trainable. ``model`` itself is untouched; its weights and those of the base are the
    same memory. Bottlenecks, LoRA and IA3 start as exactly the identity; a prefix starts at random.

    Args:
        model: a ``PreTrainedModel``, shared or not.
        plan: with ``share = "group"``, whose groups (default: the plan that the model carries).

    Raises:
        DependencyError: PEFT is not installed. ModelError: the model has no place for such modules (no cache for a
        prefix, a mixture of experts for a bottleneck), or has adapters already. OptionError: ``share = "group"``
        without a plan. PlanError: the plan does not fit.
    """
    config = config or AdaptConfig()
    peft = load_peft()
    if isinstance(model, peft.PeftModel) or any(
        isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules()
    ):
        raise ModelError("the model has adapters already.", "Give the model without them.")
    if config.share == "position" and plan is not None:
        raise OptionError("a plan was given, but share is 'position'.", "Set share = 'group'.")
    base = frozen_view(model)
    settings, shared = _settings(peft, base, config, plan)
    setattr(settings, guard.ATTRIBUTE, fingerprint(base) | {"groups": shared})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        torch.manual_seed(config.seed)
        adapted = peft.get_peft_model(base, settings)
    guard.tie_modules(adapted, shared, "default")
    return adapted.train(model.training)


def load(model: Any, folder: str | Path, *, trainable: bool = False) -> Any:
    """A PeftModel of ``model`` with the adapter saved in ``folder``; ``model`` is untouched.

    The same as ``PeftModel.from_pretrained``, but every way in which the adapter does not belong to the model is told
    before PEFT begins. Raises StoreError if ``folder`` is no adapter folder, ModelError if it is for another base.
    """
    peft, folder = load_peft(), Path(folder).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise StoreError(f"{folder} has no adapter_config.json, so it is not an adapter folder.")
    if (record := read(folder)) is not None:
        check(record, model, str(folder))
    kind = peft.PeftConfig.from_pretrained(str(folder))
    if trainable and kind.is_prompt_learning:
        raise OptionError("PEFT loads a prefix for use only, not to train it further.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        base = frozen_view(model)
        adapted = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    if not trainable:
        adapted.requires_grad_(False)  # PEFT leaves a prefix trainable
    return adapted.train(model.training)


def load_peft() -> ModuleType:
    """The module ``peft``, with layershare's additions. Raises DependencyError naming the extra that brings it."""
    try:
        import peft
    except ImportError:
        raise DependencyError("adapters need PEFT.", "Install it: pip install 'layershare[adapt]'") from None
    guard.install()
    return peft


def _settings(
    peft: Any, model: Any, config: AdaptConfig, plan: SharingPlan | None
) -> tuple[Any, list[list[str]]]:
    """The PEFT config of a method, and the groups of modules that are to be tied after it is applied."""
    head = heads(model) if config.train_head else []
    common: dict[str, Any] = {"modules_to_save": head or None}
    if config.method == "prefix":
        return _prefix(peft, model, config, common), []
    targets = [place.module for place in TARGETS[config.method](model, config)]
    together = groups(model, targets, plan) if config.share == "group" else []
    common["target_modules"] = targets
    together = [names for names in together if len(names) > 1]
    if config.method == "lora":
        lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, **common)
        lora.fan_in_fan_out = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
        return lora, together
    if config.method == "ia3":
        last = [place.module for place in places(model) if place.module in targets and place.ends]
        return peft.IA3Config(feedforward_modules=last, **common), together
    from layershare.adapt.bottleneck import BottleneckConfig

    sizes: dict[str, Any] = {"size": config.size, "activation": config.activation, "dropout": config.dropout}
    return BottleneckConfig(
        groups=together, **sizes, **common
    ), []  # its layers keep to the groups themselves


def _lora(model: nn.Module, config: AdaptConfig) -> list:
    found = [place for place in places(model) if place.part in config.parts]
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear maps in its {' or '.join(config.parts)}.")
    return found


def _ia3(model: nn.Module, _: AdaptConfig) -> list:
    """The maps into the attention, by their output, and the map out of the FFN, by its input.

    Structure does not tell queries from keys and values, so they are scaled too: d parameters more, and of no harm,
    since what scales a query scales its product with the keys.
    """
    last = {place.module for place in ends(model, ("ffn",))}
    return [p for p in places(model) if p.module in last or (p.part == "attention" and not p.ends)]


TARGETS: dict[str, Callable[[nn.Module, AdaptConfig], list]] = {
    "houlsby": lambda model, _: ends(model, ("attention", "ffn")),
    "pfeiffer": lambda model, _: ends(model, ("ffn",)),
    "lora": _lora,
    "ia3": _ia3,
}


def _prefix(peft: Any, model: Any, config: AdaptConfig, common: dict[str, Any]) -> Any:
    inner = model.base_model
    takes = [inspect.signature(part.forward).parameters for part in (model, inner)]
    find_stacks(model)
    if not any("past_key_values" in parameters for parameters in takes):
        raise ModelError(
            f"{type(model).__name__} has no key-value cache, and a prefix lives in the cache.",
            "Use houlsby, pfeiffer, lora or ia3.",
        )
    return peft.PrefixTuningConfig(task_type=_task_type(model), num_virtual_tokens=config.tokens, **common)


def _task_type(model: Any) -> str:
    """PEFT treats prefixes by the kind of task."""
    from transformers.models.auto import modeling_auto as auto

    name = type(model).__name__
    tables = {
        "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    }
    return next((task for task, table in tables.items() if name in table.values()), "FEATURE_EXTRACTION")


def heads(model: Any) -> list[str]:
    """Names of the task head's modules: beside the base model, with parameters, and no output embedding."""
    inner = getattr(model, model.base_model_prefix, None)
    if inner is None or model.get_output_embeddings() is not None:
        return []
    beside = [(name, child) for name, child in model.named_children() if child is not inner]
    return [name for name, child in beside if any(True for _ in child.parameters())]
