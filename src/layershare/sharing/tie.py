"""The only place that ties: one mechanism, shared ``Parameter`` objects.

Every position keeps its own modules, so key-value caches, adapters and hooks stay per position; what is shared is the
parameter inside::

    parent._parameters["weight"] = owner._parameters["weight"]

``install`` adds the modules that a layout needs (for ``share`` and for loading alike), ``tie`` makes the objects one,
``verify`` looks with ``is`` whether they still are.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.errors import ModelError, TieError
from layershare.linear import GATE, ORDER, AtomLinear, FactoredLinear, PivotedLinear, orders_of
from layershare.plan import SharingPlan
from layershare.sharing.carry import plan_of
from layershare.sharing.embedding import install_tables, lost_tables, remove_tables, tables_of
from layershare.sharing.gate import add_gate, has_gate, remove_gate
from layershare.sharing.kv import install_kv, install_readers, lost_kv
from layershare.sharing.layout import Layout, resolve
from layershare.sharing.names import keep_names
from layershare.sharing.wrapped import bare, base_of, submodule
from layershare.stacks import find_stacks

NAMED = 8
"""How many of the tensors that came apart an error names."""


@dataclass(frozen=True)
class Counts:
    """Numbers and bytes. ``unique`` counts each Parameter once, ``effective`` once per use. Pivots' indices count.

    ``layer_*`` counts inside the stacks only. A factored map counts the factors that it stores in both.
    """

    unique: int
    effective: int
    layer_unique: int
    layer_effective: int
    bytes_unique: int


@dataclass(frozen=True)
class Account:
    """What ``verify`` found: how many parameters are tied, how often, and the counts of the whole model."""

    tied: int
    uses: int
    factored: int
    gated: int
    counts: Counts

    def __str__(self) -> str:
        c = self.counts
        return (
            f"{self.tied} shared parameters serve {self.uses} places; "
            f"{self.factored} factored maps, {self.gated} gates. "
            f"Layers store {c.layer_unique:,} parameters, the model {c.unique:,} ({c.bytes_unique / 1e6:,.1f} MB)."
        )


def install(model: nn.Module, layout: Layout) -> None:
    """Give ``model`` the factored modules and gates of ``layout``. Values of new factors are not set, nothing is tied.

    Works on the meta device.
    """
    for job in layout.jobs:
        if job.factored:
            for name in job.modules:
                old, group = model.get_submodule(name), job.group
                if group.method == "atoms":
                    new: nn.Module = AtomLinear.standing_for(old, group.atoms, base=False)
                elif group.pivots:
                    new = PivotedLinear.standing_for(old, group.rank, base=False)
                else:
                    new = FactoredLinear.standing_for(
                        old, group.rank, base=group.method == "tie", diagonal=group.diagonal
                    )
                model.set_submodule(name, new)
    for name, gate in layout.gates:
        add_gate(model.get_submodule(name), gate.value)
    install_tables(model, layout.tables)
    install_kv(model, layout.lent)
    install_readers(model, {tuple(name.rpartition(".")[0] for name in names): None for names in layout.lent})


def tie(model: nn.Module, layout: Layout) -> None:
    """Make the members of every tie the one object that their owner holds, and let ``save_pretrained`` know.

    transformers asks any submodule for ``_tied_weights_keys`` when it saves, and only models when it ties embeddings;
    so the list stands on the stack itself. (``tie_weights`` would also cut biases to the first side of a weight, which
    is wrong for GPT-2's transposed maps.)
    """
    for owner, *members in layout.ties:
        module, _, leaf = owner.rpartition(".")
        parameter = submodule(model, module).get_parameter(leaf)
        for member in members:
            module, _, leaf = member.rpartition(".")
            submodule(model, module)._parameters[leaf] = parameter
    for stack in {job.stack for job in layout.jobs}:
        inside = [names for names in layout.ties if names[0].startswith(f"{stack}.")]
        keys = {member: owner for owner, *members in inside for member in members}
        start = len(stack) + 1
        submodule(model, stack)._tied_weights_keys = {m[start:]: o[start:] for m, o in keys.items()}  # type: ignore[assignment]
    keep_names(model, layout)


@torch.no_grad()
def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into the parameters, and orders of inputs, of these names."""
    for name, value in values.items():
        (model.get_buffer if name.endswith(f".{ORDER}") else model.get_parameter)(name).copy_(value)


@torch.no_grad()
def undo(model: PreTrainedModel, layout: Layout) -> None:
    """The reverse of ``install``, in place: every position gets weights of its own again. Gates stay."""
    remove_tables(model, layout.tables)
    for job in layout.jobs:
        for name, member in zip(job.modules, job.names, strict=True):
            module = model.get_submodule(name)
            if job.factored:
                assert isinstance(module, FactoredLinear)
                model.set_submodule(name, module.dense())
            else:
                leaf = member.rpartition(".")[2]
                old = module._parameters[leaf]
                assert old is not None
                module._parameters[leaf] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    for stack in {job.stack for job in layout.jobs}:
        del model.get_submodule(stack)._tied_weights_keys
    model.__dict__.pop("_weight_conversions", None)  # see keep_names: stored as transformers would by itself


def remove_gates(model: nn.Module, layout: Layout) -> None:
    """Take all gates off."""
    for name, _ in layout.gates:
        remove_gate(model.get_submodule(name))


def layout_of(model: nn.Module, plan: SharingPlan) -> Layout:
    """The layout of ``plan`` on a model whose dropped positions are already gone (shared or not)."""
    layout = resolve(find_stacks(model, [one.name for one in plan.stacks]), plan)
    return replace(layout, tables=tables_of(model, plan))


def broken(model: nn.Module, layout: Layout) -> list[str]:
    """Names of parameters that are not the same object as their owner, and of lost factors and gates."""
    lost = []
    for owner, *members in (*layout.ties, *_recorded(model, layout)):
        parameter = _get(model, owner)
        lost += [owner] if parameter is None else [m for m in members if _get(model, m) is not parameter]
    factored = [name for job in layout.jobs if job.factored for name in job.modules]
    lost += [name for name in factored if not isinstance(model.get_submodule(name), FactoredLinear)]
    lost += lost_tables(model, layout.tables) + lost_kv(model, layout.lent)
    lost += [f"{name}.{GATE}" for name, _ in layout.gates if not has_gate(model.get_submodule(name))]
    return list(dict.fromkeys(lost))


def verify(model: nn.Module, plan: SharingPlan | None = None) -> Account:
    """An account of the ties of ``model``; raises :class:`~layershare.errors.TieError` if one came apart.

    ``plan`` defaults to the one that the model carries. A model without a plan is an error as well. Of a model with
    adapters of PEFT the base is looked at, and its parameters are counted.
    """
    plan, model = plan or plan_of(model), bare(model)
    if plan is None:
        raise TieError(f"{type(model).__name__} carries no sharing plan: there is nothing to verify.")
    layout = layout_of(model, plan)
    if lost := broken(model, layout):
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        raise TieError(
            f"{', '.join(lost[:NAMED])}{more} came apart from the shared tensor.",
            "Call layershare.retie(model) to mend it.",
        )
    ties = list(layout.ties)
    return Account(
        tied=len(ties),
        uses=sum(map(len, ties)),
        factored=sum(len(job.layers) for job in layout.jobs if job.factored),
        gated=len(layout.gates),
        counts=count(model, [one.name for one in plan.stacks]),
    )


def retie(model: nn.Module) -> Account:
    """Tie again what a tool has untied, each group to the present values of its owner (the first position), and verify.

    What the tool did to the other positions is lost. Raises TieError where tying cannot mend it: the tool took modules
    of layershare away, or left the positions of a group unlike (other shapes, or other kinds of tensors).
    """
    if (plan := plan_of(model)) is None:
        raise TieError(f"{type(model).__name__} carries no sharing plan: there is nothing to tie.")
    view = bare(model)
    layout = layout_of(view, plan)
    possible = {(owner, member) for owner, *members in layout.ties for member in members}
    for owner, member in _recorded(view, layout):
        if (owner, member) not in possible:
            shapes = [list(view.get_parameter(name).shape) for name in (member, owner)]
            raise TieError(
                f"{member} is {shapes[0]}, the shared tensor of {owner} is {shapes[1]}: they cannot be one.",
                "Cut all positions of a group alike, as layershare prune does.",
            )
    tie(base_of(model), layout)
    return verify(model)


def count(model: nn.Module, known: Iterable[str] = ()) -> Counts:
    """Count the parameters of any model, shared or not. ``known``: see :func:`~layershare.stacks.find_stacks`."""
    try:
        names = tuple(f"{stack.name}." for stack in find_stacks(model, known))
    except ModelError:
        names = ()
    every = [*model.named_parameters(remove_duplicate=False), *orders_of(model)]
    inside = [parameter for name, parameter in every if name.startswith(names)] if names else []
    unique = _once(parameter for _, parameter in every)
    return Counts(
        unique=sum(parameter.numel() for parameter in unique),
        effective=sum(parameter.numel() for _, parameter in every),
        layer_unique=sum(parameter.numel() for parameter in _once(inside)),
        layer_effective=sum(parameter.numel() for parameter in inside),
        bytes_unique=sum(parameter.numel() * parameter.element_size() for parameter in unique),
    )


def _recorded(model: nn.Module, layout: Layout) -> Iterator[tuple[str, str]]:
    """Owner and member of each tie that ``tie`` noted on the stacks. It holds more than the layout where a tool gave a
    position another shape: the plan then reads as if that position had never been alike."""
    for stack in {job.stack: None for job in layout.jobs}:
        for member, owner in (getattr(model.get_submodule(stack), "_tied_weights_keys", None) or {}).items():
            yield f"{stack}.{owner}", f"{stack}.{member}"


def _once(parameters: Iterable[Tensor]) -> list[Tensor]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def _get(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None
