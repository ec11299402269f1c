"""Pivoted factors as plain ones and back, for what trains them or cuts into their inputs."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.linear import FactoredLinear, PivotedLinear, unpivoted
from layershare.plan import SharingPlan
from layershare.sharing import lowrank
from layershare.sharing.carry import LayershareConfig, plan_of
from layershare.sharing.tie import layout_of


@torch.no_grad()
def without_pivots(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model``, of the same function, whose pivoted maps are plain factored ones; the model itself where it
    has none."""
    if not has_pivots(model):
        return model
    new = copy.deepcopy(model)
    expand(new)
    return new


@torch.no_grad()
def with_pivots(
    model: PreTrainedModel, plan: SharingPlan, orders: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """``model``, in place, with pivots wherever ``plan`` has them: the reverse. ``orders``: of inputs, by names of
    maps; by default found anew."""
    for name in (job.modules[0] for job in layout_of(model, plan).jobs if job.group.pivots):
        old = model.get_submodule(name)
        assert isinstance(old, FactoredLinear)
        up, down, order = lowrank.pivoted(old.up, old.down, order=(orders or {}).get(name))
        new = _as(PivotedLinear, old, up, down)
        new.order = order
        model.set_submodule(name, new)
    _carry(model, plan)
    return model


def has_pivots(model: nn.Module) -> bool:
    return bool(_maps(model))


def _maps(model: nn.Module) -> dict[str, PivotedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PivotedLinear)}


@torch.no_grad()
def expand(model: PreTrainedModel) -> dict[str, Tensor]:
    """Plain factors in place of pivoted ones, in the plan too. Returns the orders of inputs, by names of maps."""
    maps = _maps(model)
    for name, old in maps.items():
        eye = torch.eye(old.rank, dtype=old.down.dtype, device=old.down.device)
        up, down = lowrank.rebalanced(old.up, unpivoted(eye, old.down, old.order))
        model.set_submodule(name, _as(FactoredLinear, old, up, down))
    plan = plan_of(model)
    assert plan is not None
    stacks = (
        one.model_copy(
            update={
                "groups": tuple(group.model_copy(update={"pivots": False}) for group in one.groups),
            }
        )
        for one in plan.stacks
    )
    _carry(model, plan.model_copy(update={"stacks": tuple(stacks)}))
    return {name: old.order for name, old in maps.items()}


def _as(kind: type[FactoredLinear], old: FactoredLinear, up: Tensor, down: Tensor) -> FactoredLinear:
    """A map of this kind in place of ``old``, whose bias it takes over."""
    new = kind(
        old.in_features, old.out_features, old.rank, base=False, bias=False, transposed=old.transposed,
        device=up.device, dtype=up.dtype,
    )  # fmt: skip
    trained = old.up.requires_grad
    new.up, new.down, new.bias = nn.Parameter(up, trained), nn.Parameter(down, trained), old.bias
    return new.train(old.training)


def _carry(model: PreTrainedModel, plan: SharingPlan) -> None:
    settings = model.config.quantization_config
    assert isinstance(settings, LayershareConfig)
    settings.plan = plan.to_dict()
