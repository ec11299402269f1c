"""How a model carries its plan: as ``quantization_config`` in its config, where transformers keeps such things."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

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
    model.config.transformers_weights = TRAP


def unmark(model: PreTrainedModel) -> None:
    """Make the config that of an ordinary model."""
    for name in ("quantization_config", "transformers_weights"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def plan_of(model: nn.Module) -> SharingPlan | None:
    """The plan that a shared model carries in its config, or None."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == NAME:
        return SharingPlan.from_dict(settings.get("plan") or {})
    return SharingPlan.from_dict(settings.plan) if isinstance(settings, LayershareConfig) else None
