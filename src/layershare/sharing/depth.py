"""Drop positions: a shorter model of the same class, its config right, its layers numbered anew."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from layershare.errors import ModelError, PlanError
from layershare.stacks import Stack, find_stacks

NUMBERS = re.compile(r"^(?!.*proj).*(indices|indexes|idxs|layers|layer_ids|blocks)$")
"""Fields that number some layers: ``attn_layer_indices``, ``moe_layers``. Those that say what is projected number
others."""


def drop_layers(model: PreTrainedModel, stack: Stack, positions: Sequence[int]) -> PreTrainedModel:
    """A new model like ``model`` without some ``positions`` of ``stack``; the weights are copies.

    The config field that sets the stack's length is found by trying: building the model on the meta device shows what
    each integer field of that value does. (Layer drop as in DistilBERT, Sanh et al., 2019, 1910.01108.)
    Raises ModelError if no field does it, PlanError if a later layer lacks parameters that the first one brings, or if
    what a kept layer does follows from its place (DiffLlama).
    """
    kept = [position for position in range(stack.length) if position not in positions]
    config = _shorter_config(model, stack, kept)
    with model.device:  # a model of names and shapes alone stays one
        shorter = _build(type(model), config)
    # The tensors themselves, each in its own precision, with the buffers that no checkpoint keeps.
    shapes = {name: value.shape for name, value in shorter.state_dict().items()}
    state = {
        name: _cut(value, shapes.get(name, value.shape), stack.length, kept).clone()
        for name, value in _renumbered(model.state_dict(), stack, kept)
    }
    found = {name: value.shape for name, value in state.items()}
    if wrong := [name for name in found | shapes if found.get(name) != shapes.get(name)]:
        raise PlanError(
            f"dropping positions {list(positions)} of {stack.name!r} leaves {wrong[0]} without a place.",
            "Keep the first position of this stack." if 0 in positions else "Keep layers of one kind.",
        )
    shorter.load_state_dict(state, assign=True)
    shorter.tie_weights()
    for name, buffer in _renumbered(dict(model.named_buffers()), stack, kept):
        if name not in state:
            module, _, leaf = name.rpartition(".")
            shorter.get_submodule(module)._buffers[leaf] = buffer.clone()
    for name, parameter in _renumbered(dict(model.named_parameters()), stack, kept):
        shorter.get_parameter(name).requires_grad_(parameter.requires_grad)
    if getattr(model, "generation_config", None) is not None:
        shorter.generation_config = copy.deepcopy(model.generation_config)
    return shorter.to(model.device).train(model.training)  # type: ignore[arg-type]


def sketch(model: PreTrainedModel) -> PreTrainedModel:
    """A model like ``model``, of names and shapes alone."""
    with torch.device("meta"):
        # What a model makes by torch.Tensor(size) does not follow the device.
        return _build(type(model), copy.deepcopy(model.config)).to("meta")  # type: ignore[arg-type]


def _renumbered(
    tensors: Mapping[str, Tensor], stack: Stack, kept: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """Those of the kept layers, by their new names, and all outside the stack."""
    new = {str(position): i for i, position in enumerate(kept)}
    for name, tensor in tensors.items():
        if not name.startswith(f"{stack.name}."):
            yield name, tensor
            continue
        position, _, rest = name.removeprefix(f"{stack.name}.").partition(".")
        if position in new:
            yield f"{stack.name}.{new[position]}.{rest}", tensor


def _other_kind(model: nn.Module, shorter: nn.Module, stack: Stack, kept: Sequence[int]) -> str:
    """What a kept layer is made with that follows from its place, unless it is its number, or for training alone."""
    for new, old in enumerate(kept):
        now = dict(shorter.get_submodule(f"{stack.name}.{new}").named_modules())
        for name, module in model.get_submodule(f"{stack.name}.{old}").named_modules():
            other = now.get(name)
            if type(other) is not type(module) or isinstance(module, nn.Dropout):
                continue
            for key, value in vars(module).items():
                if not isinstance(value, bool | int | float | str):
                    continue
                if key == "training" or key.startswith("_") or "drop" in key:
                    continue
                made = vars(other).get(key, value)
                number = type(value) is type(made) is int and value - made == old - new
                if made != value and not number:
                    return f"{'.'.join(filter(None, (str(old), name, key)))} is {value}, and would be {made}"
    return ""


def _cut(tensor: Tensor, shape: torch.Size, length: int, kept: Sequence[int]) -> Tensor:
    """``tensor``, or, where it has a part for each layer (Gemma 4 embeds words for each), those of the kept ones."""
    chosen = torch.tensor(kept, device=tensor.device)
    for axis, (had, has) in enumerate(zip(tensor.shape, shape, strict=False)):
        if had != has and had * len(kept) == has * length:
            tensor = tensor.unflatten(axis, (length, -1)).index_select(axis, chosen).flatten(axis, axis + 1)
    return tensor


def _build(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with no_init_weights():
        model = cls(config)
    model.tie_weights()
    return model


def _shorter_config(model: PreTrainedModel, stack: Stack, kept: Sequence[int]) -> PretrainedConfig:
    values = model.config.to_dict()
    lengths = {other.name: other.length for other in find_stacks(model, [stack.name])}
    wanted = lengths | {stack.name: len(kept)}
    changes = ""
    for path in _fields(values, stack.length):
        changed = copy.deepcopy(values)
        owner = _walk(changed, path[:-1])
        cut = _of_kept(owner, stack.length, kept)
        owner |= {path[-1]: len(kept), **cut}
        try:
            config = type(model.config).from_dict(copy.deepcopy(changed))  # it may write into lists
            config._attn_implementation = model.config._attn_implementation
            with torch.device("meta"):
                short = _build(type(model), config)
            found = {other.name: other.length for other in find_stacks(short, lengths)}
            taken = _walk(config.to_dict(), path[:-1])
        except Exception:  # noqa: S112 - a field that does not build is not the one we look for
            continue
        # A config may set right what we say of the layers: Gemma 4 makes the last one read all tokens.
        said = {key: value for key, value in cut.items() if isinstance(value, list)}
        if found != wanted or any(list(taken.get(key) or value) != value for key, value in said.items()):
            continue
        changes = _other_kind(model, short, stack, kept)
        if not changes:
            return config
    if changes:
        gone = [position for position in range(stack.length) if position not in kept]
        raise PlanError(
            f"dropping positions {gone} of {stack.name!r} changes others: {changes}.",
            "Keep the first position of this stack." if 0 in gone else "Gate them instead (value 0).",
        )
    raise ModelError(
        f"no field of {type(model.config).__name__} sets the length of {stack.name!r} alone: it cannot be shortened.",
        "Gate them instead (value 0).",
    )


def _of_kept(values: Mapping[str, Any], length: int, kept: Sequence[int]) -> dict[str, Any]:
    """Those of a config's ``values`` that say something of each layer, or number some of them, for the kept ones.

    What a backbone hands on stays what comes after the same layers: its stages are the stem, then one a layer."""
    lists = {key: list(value) for key, value in values.items() if isinstance(value, list | tuple)}
    new = {old: i for i, old in enumerate(kept)}
    changed: dict[str, Any] = {}
    names, handed = lists.get("stage_names", ()), lists.pop("out_indices", ())
    if handed and len(names) == length + 1:
        after = [index % len(names) for index in handed]
        changed["out_indices"] = [sum(position < index for position in kept) for index in after]
        changed["out_features"] = None
    for key, value in lists.items():
        if NUMBERS.search(key) and _numbers(value, length):
            changed[key] = [new[old] for old in value if old in new]
        elif len(value) == length:
            changed[key] = [value[position] for position in kept]
    own = {int(position): value for position, value in (values.get("per_layer_config") or {}).items()}
    if own:
        changed["per_layer_config"] = {new[old]: value for old, value in own.items() if old in new}
    return changed


def _numbers(value: list[Any], length: int) -> bool:
    """Whether these are positions of layers, in order."""
    return all(type(one) is int and 0 <= one < length for one in value) and value == sorted(set(value))


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
