"""Gated positions: ``h + g * (layer(h) - h)`` with a private scalar g.

At g = 0 the position is skipped exactly, at g = 1 it is the layer itself; so a shared model can start as the best
layer-dropped one and only gain from there. (FlexiGPT, Smith et al., 2025, has a cousin: a small private output norm.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layershare.errors import ModelError
from layershare.linear import GATE

# Hooks are numbered from 0 in each process. With a number of its own the gate's survives pickling: in a new process the
# next hook of a layer could otherwise get the same number and replace it.
_KEY = -1


def add_gate(layer: nn.Module, value: float) -> None:
    """Give ``layer`` a trainable gate. Its hook comes first, so that hooks which record see the gated output."""
    like = next(layer.parameters())
    # One element, not a scalar: FSDP takes no scalar parameters.
    layer.register_parameter(
        GATE, nn.Parameter(torch.full((1,), value, dtype=like.dtype, device=like.device))
    )
    layer._forward_hooks[_KEY] = _apply_gate
    layer._forward_hooks.move_to_end(_KEY, last=False)  # type: ignore[attr-defined]
    layer._forward_hooks_with_kwargs[_KEY] = True


def remove_gate(layer: nn.Module) -> None:
    """Take the gate off again."""
    del layer._parameters[GATE], layer._forward_hooks[_KEY], layer._forward_hooks_with_kwargs[_KEY]


def has_gate(layer: nn.Module) -> bool:
    """Whether the gate is there and in use."""
    return layer._parameters.get(GATE) is not None and layer._forward_hooks.get(_KEY) is _apply_gate


@contextmanager
def ungated(layer: nn.Module) -> Iterator[None]:
    """Within it, the layer's gate, if there is one, does nothing."""
    hook = layer._forward_hooks.pop(_KEY, None)
    try:
        yield
    finally:
        if hook is not None:
            layer._forward_hooks[_KEY] = hook
            layer._forward_hooks.move_to_end(_KEY, last=False)  # type: ignore[attr-defined]


def _apply_gate(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    before = args[0] if args else kwargs.get("hidden_states")
    after = output[0] if isinstance(output, tuple) else output
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
        raise ModelError(
            f"{type(layer).__name__} does not map hidden states to hidden states: it cannot be gated."
        )
    gated = torch.lerp(before, after, layer.get_parameter(GATE).to(after.dtype))
    return (gated, *output[1:]) if isinstance(output, tuple) else gated
