"""Drop whole positions, the least important ones; of a shared model too."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.errors import OptionError
from layershare.linear import FactoredLinear
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.prune import fit
from layershare.prune.config import PruneConfig
from layershare.prune.importance import Batch, Loss, of_positions
from layershare.sharing.carry import plan_of
from layershare.sharing.depth import drop_layers
from layershare.sharing.layout import find
from layershare.sharing.tie import install, layout_of
from layershare.stacks import Stack, find_stacks, same_stack

Drops = Mapping[str, tuple[int, ...]]
"""Stack -> the positions, counted as the model stands, that go."""


def choose(
    model: PreTrainedModel, config: PruneConfig, stacks: Sequence[Stack], batches: Sequence[Batch], loss: Loss
) -> Drops:
    """The least important positions of each stack.

    A position whose layer is unlike all others (T5's first, which holds the position biases) is never chosen, nor are
    those of ``config.protect``. Raises OptionError if too few are left to choose from, or none would go.
    """
    drops: dict[str, tuple[int, ...]] = {}
    for stack in stacks:
        count = config.removed_of(stack.length)
        if beyond := [p for p in config.protect if not 0 <= p < stack.length]:
            raise OptionError(
                f"protect names position {beyond[0]}, {stack.name!r} has 0 to {stack.length - 1}."
            )
        kinds = [tuple((w.name, w.shape) for w in layer) for layer in stack.layers]
        alone = {p for p, kind in enumerate(kinds) if Counter(kinds)[kind] == 1}
        free = [p for p in range(stack.length) if p not in alone and p not in config.protect]
        if count >= stack.length or count > len(free):
            raise OptionError(
                f"amount {config.amount} would drop {count} of the {stack.length} positions of {stack.name!r}.",
                f"At most {min(len(free), stack.length - 1)} can go.",
            )
        names = {p: f"{stack.name}.{p}" for p in free}
        if config.by == "magnitude":
            scores = {p: _magnitude(model.get_submodule(name)) for p, name in names.items()}
        else:
            seen = of_positions(model, list(names.values()), config.by, batches, loss)
            scores = {p: seen[name] for p, name in names.items()}
        drops[stack.name] = tuple(sorted(sorted(free, key=lambda p: scores[p])[:count]))
    if not any(drops.values()):
        longest = max(stack.length for stack in stacks)
        raise OptionError(f"amount {config.amount:g} of {longest} positions drops none.", "Give more.")
    return {name: gone for name, gone in drops.items() if gone}


@torch.no_grad()
def _magnitude(layer: nn.Module) -> float:
    return float(sum(parameter.double().square().sum() for parameter in layer.parameters())) ** 0.5


def drop(model: PreTrainedModel, drops: Drops) -> PreTrainedModel:
    """A new model without these positions. A shared one stays shared, by its plan without them."""
    plan = plan_of(model)
    for name, gone in drops.items():
        stack = find(find_stacks(model, list(drops)), name)
        if plan is None:
            model = drop_layers(model, stack, gone)
        else:
            plan = shorter_plan(plan, name, stack.length, gone)
            model = _drop_shared(model, stack, gone, plan)
    return model


def shorter_plan(plan: SharingPlan, name: str, length: int, gone: Sequence[int]) -> SharingPlan:
    """``plan`` when, of the ``length`` layers that it has left of a stack, those numbered ``gone`` go as well."""
    stacks = list(plan.stacks)
    at = next((i for i, one in enumerate(stacks) if same_stack(one.name, name)), None)
    if at is None:
        at = len(stacks)
        stacks.append(StackPlan(name=name, length=length))
    one = stacks[at]
    away = {*one.drop, *(one.kept[i] for i in gone)}
    groups = (_without(group, away) for group in one.groups if not away.issuperset(group.positions))
    stacks[at] = StackPlan(
        name=one.name,
        length=one.length,
        drop=tuple(away),
        groups=tuple(g for g in groups if len(g.positions) > 1 or g.method != "tie"),
        gates=tuple(gate for gate in one.gates if gate.position not in away),
    )
    return plan.model_copy(update={"stacks": tuple(stacks)})


def _without(group: Group, away: set[int]) -> Group:
    values = group.model_dump() | {"positions": tuple(p for p in group.positions if p not in away)}
    if group.source in away:  # the values are made already: only the record of where they came from goes
        values |= {"merge": "first", "source": None}
    return Group.model_validate(values)


def _drop_shared(
    model: PreTrainedModel, stack: Stack, gone: Sequence[int], plan: SharingPlan
) -> PreTrainedModel:
    """The config is that of the plain model without its positions; the tensors are taken over by their new names."""
    plain = fit.sketch(type(model), fit.plain_config(model))
    config = fit.plain_config(model, drop_layers(plain, stack, gone).config.to_dict())
    kept = [p for p in range(stack.length) if p not in gone]
    new = {f"{stack.name}.{p}": f"{stack.name}.{i}" for i, p in enumerate(kept)}

    def renamed(name: str) -> str | None:
        if not name.startswith(f"{stack.name}."):
            return name
        position, _, rest = name.removeprefix(f"{stack.name}.").partition(".")
        home = new.get(f"{stack.name}.{position}")
        return None if home is None else f"{home}.{rest}"

    outline = fit.sketch(type(model), config)
    if plan.tables or any(one.groups for one in plan.stacks):
        install(outline, layout_of(outline, plan))
    maps = {renamed(n): m for n, m in model.named_modules() if isinstance(m, FactoredLinear)}
    made: dict[int, Tensor] = {}
    state = {
        to: made.setdefault(id(value), value.detach().clone())
        for name, value in model.state_dict(keep_vars=True).items()
        if (to := renamed(name)) is not None
    }
    state = fit.densified(state, outline, {name: m for name, m in maps.items() if name is not None})
    frozen = {
        to
        for n, p in model.named_parameters(remove_duplicate=False)
        if not p.requires_grad and (to := renamed(n)) is not None
    }
    buffers = {to: b for n, b in model.named_buffers() if (to := renamed(n)) is not None}
    shares = plan.tables or any(one.groups or one.gates for one in plan.stacks)
    return fit.rebuild(model, config, state, plan if shares else None, buffers, frozen)
