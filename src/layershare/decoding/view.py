"""A decoder with fewer positions that has no weights of its own: a view of the one it was made from."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from layershare.errors import ModelError, OptionError
from layershare.stacks import Stack, find_stacks


def draft_view(model: Any, positions: Sequence[int]) -> Any:
    """``model`` with these positions of its layers alone, counted from 0; the others hand on what they get.

    Every parameter and buffer is the model's own object, so the view costs no memory and follows each change of them.
    A position keeps its number, and with it its mask and its slot in a cache; the slots of others hold next to nothing.

    Raises OptionError for positions that are not there, ModelError for a model without exactly one stack of layers, or
    whose layers give something else than hidden states.
    """
    stack = only_stack(model)
    kept = _checked(positions, stack)
    made = _length_of_outputs(model, stack)
    view = root = _shallow(model)
    *path, last = stack.name.split(".")
    for name in path:
        view._modules[name] = view = _shallow(view._modules[name])
    layers = view._modules[last] = _shallow(view._modules[last])
    for position in range(stack.length):
        if position not in kept:
            layers._modules[str(position)] = _skipped(layers._modules[str(position)], position, made)
    root.generation_config = copy.deepcopy(model.generation_config)
    return root


def _checked(positions: Sequence[int], stack: Stack) -> set[int]:
    if wrong := [p for p in positions if not 0 <= p < stack.length]:
        raise OptionError(f"There is no position {wrong[0]}.", f"The model has 0 to {stack.length - 1}.")
    if not positions:
        raise OptionError("A draft needs at least one position.")
    return set(positions)


def only_stack(model: Any) -> Stack:
    name = type(model).__name__
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ModelError(f"{name} is no decoder that generates text.")
    if getattr(model, "_is_stateful", False):
        raise ModelError(
            f"{name} keeps a state that cannot go back to an earlier token: it cannot be drafted for."
        )
    stacks = find_stacks(model)
    if len(stacks) > 1:
        raise ModelError(f"{name} has {len(stacks)} stacks of layers: a draft is made of one.")
    return stacks[0]


def _shallow(module: nn.Module) -> Any:
    """A module of its own with the same parameters, buffers and children."""
    other = copy.copy(module)
    other.__dict__["_modules"] = dict(module._modules)
    return other


def _skipped(layer: nn.Module, position: int, made: int | None) -> nn.Module:
    """A layer of the same attributes (some models read the kind of attention off it) that does nothing.

    ``made``: how many things it gives as a tuple; None for the hidden states alone.
    """
    other = _shallow(layer)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
        other.__dict__[hooks] = {}
    other.__dict__["forward"] = partial(_hand_on, position, made)
    return other


def _hand_on(position: int, made: int | None, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    cache = next((one for one in (*args, *kwargs.values()) if isinstance(one, Cache)), None)
    if (
        cache is not None
    ):  # its slot keeps the length of the others, by which masks are made: a number a token
        empty = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
        cache.update(empty, empty, position)
    return hidden_states if made is None else (hidden_states, *[None] * (made - 1))


@torch.no_grad()
def _length_of_outputs(model: Any, stack: Stack) -> int | None:
    """How many things a layer gives as a tuple; None for hidden states alone."""
    found: list[Any] = []
    layer = model.get_submodule(f"{stack.name}.0")
    handle = layer.register_forward_hook(
        lambda _, args, kwargs, output: found.append((args, kwargs, output)), with_kwargs=True
    )
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
        model.train(was_training)
    args, kwargs, output = found[0]
    before = args[0] if args else kwargs.get("hidden_states")
    after = output[0] if isinstance(output, tuple) else output
    if not (isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape):
        raise ModelError(
            f"{type(layer).__name__} does not map hidden states to hidden states: it cannot be skipped."
        )
    return len(output) if isinstance(output, tuple) else None
