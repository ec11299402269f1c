"""Merging adapters into weights: only where every position has weights of its own."""

import copy
import warnings
from typing import Any

from layershare.adapt.base import bare
from layershare.adapt.methods import load_peft
from layershare.errors import OptionError
from layershare.sharing import unshare


def merge(model: Any) -> Any:
    """A new, unshared, ordinary model with the outputs of the PeftModel ``model``; that one is untouched.

    The base is unshared first, so each position takes up its own delta: the result stores every position in full, which
    is what sharing had saved. For LoRA, IA3 and others that PEFT can merge; raises OptionError for bottlenecks (not
    linear) and prefixes (no weight).
    """
    peft = load_peft()
    dense = unshare(bare(model))
    training = dense.training  # PEFT's own modules start in training mode, whatever the base is in
    for name in model.active_adapters:
        settings = copy.deepcopy(model.peft_config[name])
        kind = str(getattr(settings.peft_type, "value", settings.peft_type))
        if settings.is_prompt_learning or kind == "LAYERSHARE_BOTTLENECK":
            raise OptionError(
                f"the adapter {name!r} ({kind}) is no change of weights, so it cannot be merged.",
                "Keep it as it is.",
            )
        state = peft.get_peft_model_state_dict(model, adapter_name=name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            wrapped = peft.get_peft_model(dense, settings, adapter_name=name)
        peft.set_peft_model_state_dict(wrapped, state, adapter_name=name)
        dense = wrapped.merge_and_unload(safe_merge=True)
    return dense.requires_grad_(True).train(training)
