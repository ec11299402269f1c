"""Pivoted factors as plain ones and back, for what cuts into their inputs."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from layershare.linear import ORDER, FactoredLinear, PivotedLinear, unpivoted
from layershare.plan import SharingPlan
from layershare.sharing import lowrank
from layershare.sharing.carry import LayershareConfig, plan_of
from layershare.sharing.tie import layout_of


@torch.no_grad()
def without_pivots(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model``, of the same function, whose pivoted maps are plain factored ones; the model itself where it
    has none."""
    plan = plan_of(model)
    if plan is None or not any(isinstance(module, PivotedLinear) for module in model.modules()):
        return model
    new = copy.deepcopy(model)
    for name, old in [(n, m) for n, m in new.named_modules() if isinstance(m, PivotedLinear)]:
        eye = torch.eye(old.rank, dtype=old.down.dtype, device=old.down.device)
        down = nn.Parameter(unpivoted(eye, old.down, old.order), old.down.requires_grad)
        new.set_submodule(name, _as(FactoredLinear, old, old.get_parameter("up"), down))
    groups = {
        group: group.model_copy(update={"pivots": False}) for one in plan.stacks for group in one.groups
    }
    stacks = (
        one.model_copy(update={"groups": tuple(groups[group] for group in one.groups)}) for one in plan.stacks
    )
    _carry(new, plan.model_copy(update={"stacks": tuple(stacks)}))
    return new


@torch.no_grad()
def with_pivots(model: PreTrainedModel, plan: SharingPlan) -> PreTrainedModel:
    """``model``, in place, with pivots wherever ``plan`` has them: the reverse."""
    for name in (job.modules[0] for job in layout_of(model, plan).jobs if job.group.pivots):
        old = model.get_submodule(name)
        assert isinstance(old, FactoredLinear)
        up, down, order = lowrank.pivoted(old.up, old.down)
        trained = old.up.requires_grad
        new = _as(PivotedLinear, old, nn.Parameter(up, trained), nn.Parameter(down, trained))
        new.get_buffer(ORDER).copy_(order)
        model.set_submodule(name, new)
    _carry(model, plan)
    return model


def _as(
    kind: type[FactoredLinear], old: FactoredLinear, up: nn.Parameter, down: nn.Parameter
) -> FactoredLinear:
    """A map of this kind in place of ``old``, whose bias it takes over."""
    new = kind(
        old.in_features, old.out_features, old.rank, base=False, bias=False, transposed=old.transposed,
        device=up.device, dtype=up.dtype,
    )  # fmt: skip
    new.up, new.down, new.bias = up, down, old.bias
    return new.train(old.training)


def _carry(model: PreTrainedModel, plan: SharingPlan) -> None:
    settings = model.config.quantization_config
    assert isinstance(settings, LayershareConfig)
    settings.plan = plan.to_dict()
