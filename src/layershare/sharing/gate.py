"""Gated positions: ``h + g * (layer(h) - h)`` with a private scalar g.

At g = 0 the position is skipped exactly, at g = 1 it is the layer itself; so a shared model can start as the best
layer-dropped one and only gain from there. (FlexiGPT, Smith et al., 2025, has a cousin: a small private output norm.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from layershare.errors import ModelError
from layershare.linear import GATE


def add_gate(layer: nn.Module, value: float) -> None:
    """Give ``layer`` a trainable gate. Its forward hook comes first, so that hooks which record see the gated output."""
    like = next(layer.parameters())
    layer.register_parameter(GATE, nn.Parameter(torch.full((), value, dtype=like.dtype, device=like.device)))
    layer.register_forward_hook(_apply_gate, prepend=True, with_kwargs=True)


def remove_gate(layer: nn.Module) -> None:
    """Take the gate off again."""
    del layer._parameters[GATE]
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _apply_gate]:
        del layer._forward_hooks[key], layer._forward_hooks_with_kwargs[key]


def _apply_gate(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    before = args[0] if args else kwargs.get("hidden_states")
    after = output[0] if isinstance(output, tuple) else output
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
        raise ModelError(f"{type(layer).__name__} does not map hidden states to hidden states: it cannot be gated.")
    gated = torch.lerp(before, after, layer.get_parameter(GATE).to(after.dtype))
    return (gated, *output[1:]) if isinstance(output, tuple) else gated
