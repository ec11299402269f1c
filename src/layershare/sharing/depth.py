"""Drop positions: a shorter model of the same class, its config right, its layers numbered anew."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from layershare.errors import ModelError, PlanError
from layershare.stacks import Stack, find_stacks


def drop_layers(model: PreTrainedModel, stack: Stack, positions: Sequence[int]) -> PreTrainedModel:
    """A new model like ``model`` without some ``positions`` of ``stack``; the weights are copies.

    The config field that sets the stack's length is found by trying: building the model on the meta device shows what
    each integer field of that value does. (Layer drop as in DistilBERT, Sanh et al., 2019, 1910.01108.)
    Raises ModelError if no field does it, PlanError if a later layer lacks parameters that the first one brings.
    """
    kept = [position for position in range(stack.length) if position not in positions]
    shorter = _build(type(model), _shorter_config(model, stack, kept)).to(model.dtype)
    names = {f"{stack.name}.{old}.": f"{stack.name}.{new}." for new, old in enumerate(kept)}
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith(f"{stack.name}."):
            old = next((old for old in names if name.startswith(old)), None)
            if old is None:
                continue
            name = names[old] + name[len(old) :]
        state[name] = value
    missing, unexpected = shorter.load_state_dict(state, strict=False)
    if wrong := [*missing, *unexpected]:
        raise PlanError(
            f"dropping positions {list(positions)} of {stack.name!r} leaves {wrong[0]} without a place.",
            "Keep the first position of this stack." if 0 in positions else "Keep layers of one kind.",
        )
    if getattr(model, "generation_config", None) is not None:
        shorter.generation_config = copy.deepcopy(model.generation_config)
    return shorter.to(model.device).train(model.training)


def _build(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with no_init_weights():
        model = cls(config)
    model.tie_weights()
    return model


def _shorter_config(model: PreTrainedModel, stack: Stack, kept: Sequence[int]) -> PretrainedConfig:
    values = model.config.to_dict()
    lengths = {other.name: other.length for other in find_stacks(model)}
    wanted = lengths | {stack.name: len(kept)}
    for path in _fields(values, stack.length):
        changed = copy.deepcopy(values)
        owner = _walk(changed, path[:-1])
        owner[path[-1]] = len(kept)
        for key, value in owner.items():
            if isinstance(value, list | tuple) and len(value) == stack.length:
                owner[key] = [value[position] for position in kept]
        try:
            config = type(model.config).from_dict(changed)
            config._attn_implementation = model.config._attn_implementation
            with torch.device("meta"):
                found = {other.name: other.length for other in _find_or_one(_build(type(model), config), stack.name)}
        except Exception:  # noqa: BLE001, S112 - a field that does not build is not the one we look for
            continue
        if found == wanted:
            return config
    raise ModelError(
        f"no field of {type(model.config).__name__} sets the length of {stack.name!r} alone: positions cannot be dropped.",
        "Gate them instead (value 0).",
    )


def _find_or_one(model: nn.Module, name: str) -> Iterator[Stack]:
    """The stacks, and a list that is too short to count as one because only one layer is left."""
    try:
        found = find_stacks(model)
    except ModelError:
        found = ()
    yield from found
    if name not in [stack.name for stack in found]:
        layers = model.get_submodule(name)
        yield Stack(name, tuple(type(layer).__name__ for layer in layers.children()), ((),) * len(list(layers.children())))


def _fields(values: dict[str, Any], length: int, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, length, (*path, key))
        elif type(value) is int and value == length:
            yield (*path, key)


def _walk(values: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        values = values[key]
    return values
