"""How a model carries its plan: as ``quantization_config`` in its config, where transformers keeps such things."""

from functools import wraps
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from layershare.errors import PlanError
from layershare.plan import SharingPlan

NAME = "layershare"
# A weights file that does not exist: stock code without layershare stops there, and says this (see store/hub.py).
TRAP = "this-model-needs--import-layershare--first.safetensors"


@register_quantization_config(NAME)
class LayershareConfig(QuantizationConfigMixin):
    """What config.json keeps of a shared model: the plan, and how it was made."""

    def __init__(self, plan: dict | None = None, made: dict | None = None, **unknown: Any) -> None:
        self.quant_method = NAME  # type: ignore[assignment]
        self.plan = SharingPlan.from_dict(plan or {}, "config.json: quantization_config.plan").to_dict()
        self.made = made or {}


def mark(model: PreTrainedModel, plan: SharingPlan, made: dict | None = None) -> None:
    """Write ``plan`` into the model's config, so that ``save_pretrained`` and Trainer checkpoints carry it."""
    model.config.quantization_config = LayershareConfig(plan.to_dict(), made)


def remember(model: PreTrainedModel, **made: Any) -> None:
    """Write beside the plan that ``model`` carries how it was made; a model without a plan is left as it is."""
    if isinstance(known := getattr(model.config, "quantization_config", None), LayershareConfig):
        known.made |= made


def unmark(model: PreTrainedModel) -> None:
    """Make the config that of an ordinary model."""
    del model.config.quantization_config


def plan_of(model: nn.Module) -> SharingPlan | None:
    """The plan that a shared model carries in its config, or None."""
    plan = _plan(getattr(model, "config", None))
    return None if plan is None else SharingPlan.from_dict(plan)


def refuse_shared(model: nn.Module, name: object) -> None:
    """Raise PlanError where the model, which the user calls ``name``, carries a plan."""
    if plan_of(model) is not None:
        raise PlanError(f"{name} is shared already.", "Give the original.")


def _plan(config: Any) -> dict | None:
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict):  # of a config that came without a model
        return settings.get("plan") or {} if settings.get("quant_method") == NAME else None
    return settings.plan if isinstance(settings, LayershareConfig) else None


_write = PretrainedConfig.to_json_file


@wraps(_write)
def _write_with_trap(config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
    if _plan(config) is None:
        return _write(config, *args, **kwargs)
    config.transformers_weights = TRAP
    try:
        return _write(config, *args, **kwargs)
    finally:
        del config.transformers_weights


# The one method of transformers that layershare replaces: config.save_pretrained takes the field away before it writes.
PretrainedConfig.to_json_file = _write_with_trap  # type: ignore[method-assign, assignment]
