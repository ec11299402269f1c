"""A config for the sizes that are left, found by trying, and a model built from it.

Which field sets the number of heads or neurons is not known beforehand: each field of the old value gets the new one,
the model is built on the meta device, and the field counts if all that it changes is what should change.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from layershare.errors import ModelError
from layershare.linear import FACTORS, ORDER, FactoredLinear
from layershare.plan import SharingPlan
from layershare.sharing.carry import TRAP, mark
from layershare.sharing.tie import install, layout_of, tie, verify

Shape = tuple[int, ...]
Path = tuple[str, ...]
Head = tuple[int, int, int]
"""Size of a head, their number before and after."""
_HEADS = re.compile(r"head(?!.*(dim|size))")
_OURS = ("quantization_config", "transformers_weights")


def plain_config(model: PreTrainedModel, values: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A copy of the model's config (or of these values) as that of a model without a sharing plan."""
    values = {k: v for k, v in (values or model.config.to_dict()).items() if k not in _OURS}
    config = type(model.config).from_dict(copy.deepcopy(values))
    config._attn_implementation = model.config._attn_implementation
    if getattr(config, "transformers_weights", None) == TRAP:
        config.transformers_weights = None
    return config


def sketch(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device."""
    with torch.device("meta"):
        return _build(cls, config)


def _build(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with no_init_weights():
        model = cls(config)
    model.tie_weights()
    return model


def shapes(model: nn.Module) -> dict[str, Shape]:
    """Every parameter's shape by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def fit_config(
    model: PreTrainedModel,
    wanted: Mapping[str, Shape],
    sizes: Sequence[tuple[int, int]],
    head: Head | None = None,
) -> tuple[PretrainedConfig, dict[str, int]]:
    """The config with which the parameters named in ``wanted`` have these shapes, and all others keep theirs.

    sizes: (old, new) values of fields to try. head: with heads, (size of a head, old number, new number): the size may
    have to be written into a field ``head_dim``, and parameters with one entry a head may change along, such as
    tables of position biases; these come back as name -> axis.
    Raises ModelError if no set of fields does it.
    """
    values = plain_config(model).to_dict()
    base = shapes(sketch(type(model), plain_config(model)))
    wanted = {name: shape for name, shape in wanted.items() if base[name] != shape}
    for extra in _extras(values, head):
        for open_too in (False, True) if head is None else (False,):
            found = _accumulate(model, values, extra, base, wanted, sizes, head, open_too)
            if found is not None:
                return found
    raise ModelError(
        f"no fields of {type(model.config).__name__} give {_words(sizes)} there and nowhere else.",
        "Where one field serves several stacks, prune them together.",
    )


def _extras(values: dict[str, Any], head: Head | None) -> Iterator[dict[Path, int]]:
    """Fields to set beforehand: none, or the size of a head where a config may name it but does not."""
    yield {}
    if head is not None:
        for path in [(), *((key,) for key, value in values.items() if isinstance(value, dict))]:
            owner = _walk(values, path)
            if owner.get("head_dim") is None and any("head" in str(key) for key in owner):
                yield {(*path, "head_dim"): head[0]}


def _accumulate(
    model: PreTrainedModel,
    values: dict[str, Any],
    extra: dict[Path, int],
    base: dict[str, Shape],
    wanted: dict[str, Shape],
    sizes: Sequence[tuple[int, int]],
    head: Head | None,
    open_too: bool,
) -> tuple[PretrainedConfig, dict[str, int]] | None:
    taken: dict[Path, Any] = dict(extra)
    now = base
    candidates = list(_candidates(values, sizes, open_too))
    if head is not None:
        # Together first, and no sizes of a head: alone, in a map of query, key and value, they may look like numbers.
        candidates = [(path, value) for path, value in candidates if _HEADS.search(path[-1])]
        after = _try(model, values, taken | dict(candidates))
        changed = _changed(base, after) if after is not None else {}
        if changed and {n: s for n, s in changed.items() if n in wanted} == wanted:
            tables = _tables(base, {n: s for n, s in changed.items() if n not in wanted}, head)
            if tables is not None:
                return plain_config(model, _with(values, taken | dict(candidates))), tables
    for _ in range(2):  # a field may build only after another one has changed
        for path, value in candidates:
            if path in taken or all(now[name] == shape for name, shape in wanted.items()):
                continue
            after = _try(model, values, taken | {path: value})
            changed = _changed(now, after) if after is not None else {}
            tables = _tables(base, {n: s for n, s in changed.items() if n not in wanted}, head)
            if (
                changed
                and tables is not None
                and all(wanted[n] == s for n, s in changed.items() if n in wanted)
            ):
                taken, now = taken | {path: value}, after or now
    changed = _changed(base, now)
    if any(changed.get(name) != shape for name, shape in wanted.items()):
        return None
    tables = _tables(base, {n: s for n, s in changed.items() if n not in wanted}, head)
    return plain_config(model, _with(values, taken)), tables or {}


def _try(model: PreTrainedModel, values: dict[str, Any], taken: dict[Path, Any]) -> dict[str, Shape] | None:
    try:
        return shapes(sketch(type(model), plain_config(model, _with(values, taken))))
    except Exception:  # a field that does not build is not the one we look for
        return None


def _changed(before: dict[str, Shape], after: dict[str, Shape]) -> dict[str, Shape]:
    if before.keys() != after.keys():
        return dict.fromkeys(before.keys() ^ after.keys(), ())
    return {name: shape for name, shape in after.items() if shape != before[name]}


def _tables(base: dict[str, Shape], changed: dict[str, Shape], head: Head | None) -> dict[str, int] | None:
    """name -> the axis with one entry a head; None if something else has changed."""
    found: dict[str, int] = {}
    for name, shape in changed.items():
        old = base.get(name, ())
        axes = [i for i, (a, b) in enumerate(zip(old, shape, strict=False)) if a != b]
        if (
            head is None
            or len(old) != len(shape)
            or len(axes) != 1
            or (old[axes[0]], shape[axes[0]]) != head[1:]
        ):
            return None
        found[name] = axes[0]
    return found


def _candidates(
    values: dict[str, Any], sizes: Sequence[tuple[int, int]], open_too: bool
) -> Iterator[tuple[Path, Any]]:
    for path, value in _fields(values):
        for old, new in dict.fromkeys(sizes):
            if type(value) is int and value == old:
                yield path, new
            elif isinstance(value, list) and any(type(one) is int and one == old for one in value):
                yield path, [new if one == old else one for one in value]
            elif open_too and value is None:
                yield path, new
            elif open_too and "ratio" in str(path[-1]) and type(value) in (int, float):
                scaled = value * new / old
                yield path, int(scaled) if scaled.is_integer() else scaled


def _fields(values: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, (*path, key))
        else:
            yield (*path, key), value


def _with(values: dict[str, Any], taken: dict[Path, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    for path, value in taken.items():
        _walk(changed, path[:-1])[path[-1]] = value
    return changed


def _walk(values: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        values = values[key]
    return values


def _words(sizes: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"{new} in place of {old}" for old, new in dict.fromkeys(sizes))


def rebuild(
    model: PreTrainedModel,
    config: PretrainedConfig,
    state: dict[str, Tensor],
    plan: SharingPlan | None,
    buffers: Mapping[str, Tensor],
    frozen: set[str],
) -> PreTrainedModel:
    """A new model of the class of ``model`` from ``config``, with the tensors of ``state`` and shared by ``plan``.

    buffers: those that no checkpoint keeps, used where the shape is still the same. frozen: names of parameters that
    are not trained.
    """
    new = _build(type(model), config)
    layout = layout_of(new, plan) if plan is not None else None
    if layout is not None:
        install(new, layout)
    new.load_state_dict(state, strict=True, assign=True)
    new.tie_weights()
    if layout is not None and plan is not None:
        tie(new, layout)
        verify(new, plan)
        made = getattr(getattr(model.config, "quantization_config", None), "made", None)
        if layout.changes:
            mark(new, plan, made)
    for name, buffer in buffers.items():
        module, _, leaf = name.rpartition(".")
        old = new.get_submodule(module)._buffers.get(leaf)
        if name not in state and old is not None and old.shape == buffer.shape:
            new.get_submodule(module)._buffers[leaf] = buffer.clone()
    for name, parameter in new.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name not in frozen)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    new.to(model.device)  # type: ignore[arg-type]
    return new.train(model.training)


def densified(
    state: dict[str, Tensor], new: nn.Module, old: Mapping[str, FactoredLinear]
) -> dict[str, Tensor]:
    """``state`` with the dense weights of the maps in ``old`` (new name -> map) that are not factored in ``new``."""
    state = dict(state)
    for name, module in old.items():
        if not isinstance(new.get_submodule(name), FactoredLinear):
            for factor in (*FACTORS, ORDER):
                state.pop(f"{name}.{factor}", None)
            state[f"{name}.weight"] = module.weight.detach().clone().contiguous()
    return state
