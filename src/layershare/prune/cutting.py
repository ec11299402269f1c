"""Take the chosen heads and neurons away, or zero them, and prove that the result is the same."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from layershare.architectures.inputs import run
from layershare.errors import ModelError
from layershare.linear import AtomLinear, FactoredLinear, kind_of
from layershare.prune import fit
from layershare.prune.blocks import Block, Inputs
from layershare.sharing.carry import plan_of
from layershare.sharing.pivots import with_pivots, without_pivots


@dataclass(frozen=True)
class Choice:
    """What goes. ``cells``: blocks that must lose the same units, with the units that go, ascending."""

    what: str
    cells: tuple[tuple[tuple[Block, ...], tuple[int, ...]], ...]

    @property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        """Reading map -> the units that it loses."""
        return {block.out: gone for cell, gone in self.cells for block in cell}


def module_of(block: Block) -> str:
    """The module that holds the writers, with a dot behind."""
    return block.ins[0][0].rpartition(".")[0] + "."


def axes_of(module: nn.Module, *, reads: bool) -> list[tuple[str, int]]:
    """(leaf, axis) of the parameters of a linear map that have its inputs (``reads``) or outputs along an axis."""
    if isinstance(module, AtomLinear):
        raise ModelError(
            "a map that is mixed of shared atoms cannot lose inputs or outputs.", "Unshare it first."
        )
    if isinstance(module, FactoredLinear):
        if module.diagonal is not None:
            raise ModelError(
                "a map with a private diagonal cannot lose inputs or outputs.", "Unshare it first."
            )
        found = [("base", 1), ("down", 1)] if reads else [("base", 0), ("up", 0), ("bias", 0)]
    else:
        flipped = kind_of(module) == "conv1d"
        found = [("weight", 1 - flipped)] if reads else [("weight", int(flipped)), ("bias", 0)]
    return [(leaf, axis) for leaf, axis in found if module._parameters.get(leaf) is not None]


def cut_parameters(model: nn.Module, block: Block) -> list[tuple[nn.Parameter, int]]:
    """The parameters from which a cut of the block takes something, and along which axis."""
    found = []
    for name, reads in [(block.out, True), *((name, False) for name, _ in block.ins)]:
        module = model.get_submodule(name)
        found += [(module.get_parameter(leaf), axis) for leaf, axis in axes_of(module, reads=reads)]
    return found


def _kept(block: Block, gone: Iterable[int]) -> Tensor:
    gone = set(gone)
    return torch.tensor([unit for unit in range(block.units) if unit not in gone], dtype=torch.long)


def config_for(
    model: PreTrainedModel, blocks: Sequence[Block], gone: Mapping[str, int]
) -> tuple[PretrainedConfig, dict[str, int]]:
    """The config when each block (by reading map) has lost this many units, and the tables that lose heads too.

    Raises ModelError if the config cannot say it.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    sizes: list[tuple[int, int]] = []
    head = None
    for block in blocks:
        left = block.units - gone[block.out]
        for name, reads in [(block.out, True), *((name, False) for name, _ in block.ins)]:
            module = model.get_submodule(name)
            leaves = [("weight", _weight_axis(module, reads=reads))]
            leaves += [("bias", 0)] if not reads and module._parameters.get("bias") is not None else []
            for leaf, axis in leaves:
                shape = list(module.weight.shape if leaf == "weight" else module.bias.shape)  # type: ignore[arg-type]
                shape[axis] = shape[axis] // block.units * left
                wanted[f"{name}.{leaf}"] = tuple(shape)
        sizes.append((block.units, left))
        if block.kind == "heads":
            each = block.heads // block.units
            sizes.append((block.heads, left * each))
            if left < block.units:
                head = (block.width // each, block.heads, left * each)
    return fit.fit_config(model, wanted, sizes, head)


def _weight_axis(module: nn.Module, *, reads: bool) -> int:
    return int(reads) if kind_of(module) != "conv1d" else int(not reads)


@torch.no_grad()
def cut(model: PreTrainedModel, choice: Choice) -> PreTrainedModel:
    """A new model without the units of ``choice``; its config says so, and what was shared is shared.

    Raises ModelError if the architecture cannot express it, PlanError if a low-rank correction would no longer fit.
    """
    plan = plan_of(model)
    model = without_pivots(model)  # which inputs are pivots may not outlive the cut
    blocks = [block for cell, _ in choice.cells for block in cell]
    gone = choice.blocks
    config, tables = config_for(model, blocks, {name: len(units) for name, units in gone.items()})
    cuts: dict[int, list[tuple[int, Tensor]]] = {}
    for block in blocks:
        kept = _kept(block, gone[block.out])
        reader = model.get_submodule(block.out)
        todo = [(reader, leaf, axis, block.columns(kept)) for leaf, axis in axes_of(reader, reads=True)]
        for i, (name, _) in enumerate(block.ins):
            writer = model.get_submodule(name)
            todo += [(writer, leaf, axis, block.rows(i, kept)) for leaf, axis in axes_of(writer, reads=False)]
        for module, leaf, axis, index in todo:
            entry = cuts.setdefault(id(module.get_parameter(leaf)), [])
            if all(axis != other for other, _ in entry):
                entry.append((axis, index))
    for name, axis in tables.items():
        holder = next((b for b in blocks if name.startswith(module_of(b))), None)
        if holder is None:
            raise ModelError(
                f"{name} has an entry for each head, and it is not known for which.", "Zero them instead."
            )
        heads = _kept(holder, gone[holder.out])
        each = holder.heads // holder.units
        index = (heads[:, None] * each + torch.arange(each)).flatten()
        cuts.setdefault(id(model.get_parameter(name)), []).append((axis, index))
    made: dict[int, Tensor] = {}
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in made:
            tensor = value.detach()
            for axis, index in cuts.get(id(value), ()):
                tensor = tensor.index_select(axis, index.to(tensor.device))
            made[id(value)] = tensor if id(value) in cuts else tensor.clone()
        state[name] = made[id(value)]
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    new = fit.rebuild(model, config, state, plan_of(model), dict(model.named_buffers()), frozen)
    return new if plan is None or plan == plan_of(model) else with_pivots(new, plan)


@torch.no_grad()
def zero(model: PreTrainedModel, choice: Choice) -> PreTrainedModel:
    """A copy of ``model`` in which nothing reads the units of ``choice``: the same function as :func:`cut`."""
    new = copy.deepcopy(without_pivots(model))
    for cell, gone in choice.cells:
        for block in cell:
            module = new.get_submodule(block.out)
            columns = block.columns(torch.tensor(gone, dtype=torch.long))
            for leaf, axis in axes_of(module, reads=True):
                parameter = module.get_parameter(leaf)
                parameter.index_fill_(axis, columns.to(parameter.device), 0)
    return new


@torch.no_grad()
def prove(model: PreTrainedModel, cut_: PreTrainedModel, choice: Choice, inputs: Inputs) -> None:
    """Raise ModelError unless the cut model computes what ``model`` does when the units of ``choice`` are silent."""

    def silence(block: Block, gone: tuple[int, ...]) -> Callable:
        columns = block.columns(torch.tensor(gone, dtype=torch.long))
        return lambda _module, args: (args[0].index_fill(-1, columns.to(args[0].device), 0), *args[1:])

    handles = [
        model.get_submodule(block.out).register_forward_pre_hook(silence(block, gone))
        for cell, gone in choice.cells
        for block in cell
    ]
    modes = model.training, cut_.training
    try:
        with torch.random.fork_rng():
            masked, pruned = (run(m.eval(), dict(inputs)) for m in (model, cut_))
    finally:
        for handle in handles:
            handle.remove()
        model.train(modes[0])
        cut_.train(modes[1])
    for one, other in zip(masked, pruned, strict=True):
        tolerance = 1e-3 if one.dtype in (torch.float32, torch.float64) else 0.1
        largest = max(float(one.abs().max()), 1e-6)
        if one.shape != other.shape or float((one - other).abs().max()) > tolerance * largest:
            raise ModelError(
                f"without these {choice.what} {type(model).__name__} does not compute what it does when they are "
                "silent: its architecture uses them in a way that is not understood.",
                "Zero them instead (keep_shape = true).",
            )
