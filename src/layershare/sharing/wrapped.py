"""Models that PEFT has put adapters into: seen without them, and reached through them.

PEFT stands a module of its own in place of each one that it adapts. The plan speaks of what is inside.
"""

import copy
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def bare(model: Any) -> Any:
    """``model`` without the adapters of PEFT, but with its trained head: other modules, the very same parameters.

    A model without adapters is returned as it is. (PEFT's own ``unload`` would change the model.)
    """
    if (root := base_of(model)) is model and next(_wrappers(model), None) is None:
        return model
    base = copy.deepcopy(root, {id(tensor): tensor for tensor in _tensors(model)})
    while (found := next(_wrappers(base), None)) is not None:
        base.set_submodule(*found)
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def base_of(model: Any) -> Any:
    """The model inside a ``PeftModel`` or ``PeftMixedModel``, adapters and all; any other model itself."""
    if (peft := sys.modules.get("peft")) is None:
        return model
    if isinstance(model, peft.PeftModel):
        return model.get_base_model()
    return model.base_model.model if isinstance(model, peft.PeftMixedModel) else model


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module of this name in ``bare(root)``, but the one that ``root`` computes with."""
    module = _inside(root)
    for step in path.split(".") if path else ():
        module = _inside(module.get_submodule(step))
    return module


def _inside(module: nn.Module) -> nn.Module:
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper of PEFT stands for; None if it is none."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        return module.modules_to_save[active[0]] if active else module.original_module
    return None


def _wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name of each wrapper of PEFT, and what it stands for."""
    for name, module in model.named_modules():
        if (inner := _wrapped(module)) is not None:
            yield name, inner


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
