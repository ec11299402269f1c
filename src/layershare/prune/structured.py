"""Choose heads and neurons to cut: the same ones wherever their weights are shared."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.errors import ModelError, OptionError
from layershare.linear import kind_of
from layershare.prune.blocks import Block, Inputs, find_heads, find_neurons, probe_inputs
from layershare.prune.config import PruneConfig
from layershare.prune.cutting import Choice, config_for, cut_parameters, module_of
from layershare.prune.importance import Batch, Loss, of_inputs
from layershare.prune.select import lowest
from layershare.stacks import Stack


def find_blocks(model: PreTrainedModel, stacks: Sequence[Stack], what: str, inputs: Inputs) -> list[Block]:
    """All blocks of these stacks."""
    find = find_heads if what == "heads" else find_neurons
    return [block for stack in stacks for block in find(model, stack, inputs)]


def cells_of(model: nn.Module, blocks: Sequence[Block], tables: Mapping[str, int]) -> list[tuple[Block, ...]]:
    """Blocks grouped by what is cut: those whose cut parameters are the same object, and those that read one table of
    position biases, which stands in some position for all."""
    owner: dict[object, int] = {}
    group = list(range(len(blocks)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, block in enumerate(blocks):
        marks: list[object] = [id(p) for p, _ in cut_parameters(model, block)]
        alike = [b for b in blocks if b.stack == block.stack and b.place == block.place]
        holders = {name for name in tables for b in alike if name.startswith(module_of(b))}
        if holders and len(holders) < len(alike):
            marks.append((block.stack, block.place))
        for one in marks:
            group[root(i)] = root(owner.setdefault(one, i))
    found: dict[int, list[Block]] = {}
    for i, block in enumerate(blocks):
        found.setdefault(root(i), []).append(block)
    return [tuple(cell) for cell in found.values()]


def choose(
    model: PreTrainedModel,
    config: PruneConfig,
    stacks: Sequence[Stack],
    batches: Sequence[Batch],
    loss: Loss,
) -> tuple[Choice, Inputs]:
    """Which units ``config`` cuts, and inputs to prove the cut with.

    Raises OptionError if all units or none would go, ModelError if the architecture does not allow fewer.
    """
    inputs = probe_inputs(model, batches)
    blocks = find_blocks(model, stacks, config.what, inputs)
    gone = {block.out: config.removed_of(block.units) for block in blocks}
    for block in blocks:
        if gone[block.out] >= block.units:
            raise OptionError(
                f"amount {config.amount} would cut all {block.units} {_units(block)} of {block.out}.",
                "At least one must stay.",
            )
    if not any(gone.values()):
        units = max(block.units for block in blocks)
        raise OptionError(
            f"amount {config.amount:g} of {units} {_units(blocks[0])} a block cuts none.", "Give more."
        )
    tables: dict[str, int] = {}
    if config.what == "heads" and not config.keep_shape:
        tables, gone = _possible(model, config, blocks, gone)
    cells = cells_of(model, blocks, tables)
    scores = importance(model, blocks, config.by, batches, loss)
    chosen = []
    for cell in cells:
        total = torch.stack([scores[block.out] for block in cell]).sum(0)
        mask = lowest(total, gone[cell[0].out])
        chosen.append((cell, tuple(torch.nonzero(mask).flatten().tolist())))
    return Choice(config.what, tuple(chosen)), inputs


def _possible(
    model: PreTrainedModel,
    config: PruneConfig,
    blocks: Sequence[Block],
    gone: dict[str, int],
) -> tuple[dict[str, int], dict[str, int]]:
    """The tables that lose heads too, and how many go: where a fraction is asked, the most that the config can say."""
    error: ModelError | None = None
    for less in range(max(gone.values())):
        fewer = {name: max(count - less, 0) for name, count in gone.items()}
        try:
            return config_for(model, blocks, fewer)[1], fewer
        except ModelError as failure:
            error = error or failure
        if isinstance(config.amount, int):
            break
    assert error is not None
    units = max(block.units for block in blocks)
    possible = [n for n in range(1, units) if _fits(model, blocks, n)] if units <= 32 else []
    if possible:
        hint = f"Amounts that it can: {', '.join(map(str, possible))} of {units}."
    else:
        hint = "It ties the size of a head to their number: zero them instead (keep_shape = true), or cut neurons."
    raise ModelError(
        f"{type(model).__name__} cannot have that few heads of the same size: {error.message}", hint
    )


def _fits(model: PreTrainedModel, blocks: Sequence[Block], count: int) -> bool:
    try:
        config_for(model, blocks, {block.out: min(count, block.units - 1) for block in blocks})
    except ModelError:
        return False
    return True


def _units(block: Block) -> str:
    if block.kind == "heads" and block.heads > block.units:
        return f"groups of {block.heads // block.units} heads with one key and value"
    return block.kind


def importance(
    model: PreTrainedModel, blocks: Sequence[Block], by: str, batches: Iterable[Batch], loss: Loss
) -> dict[str, Tensor]:
    """The importance of each unit of each block, (units), by reading map.

    magnitude: Euclidean norm of all weights that write and read the unit. activation: root mean square of what it
    passes on. taylor: see :mod:`layershare.prune.importance`, mean over batches.
    """
    if by == "magnitude":
        return {block.out: _magnitude(model, block) for block in blocks}
    seen = of_inputs(model, [block.out for block in blocks], by, batches, loss)
    if by == "activation":
        return {b.out: seen[b.out].view(b.units, b.width).mean(1).sqrt() for b in blocks}
    return {b.out: seen[b.out].view(-1, b.units, b.width).sum(2).abs().mean(0) for b in blocks}


@torch.no_grad()
def _magnitude(model: nn.Module, block: Block) -> Tensor:
    columns = _dense(model.get_submodule(block.out)).double().square().sum(0)
    squares = columns.view(block.units, block.width).sum(1)
    for name, sections in block.ins:
        rows = _dense(model.get_submodule(name)).double().square().sum(1)
        for section in rows.split(sections):
            squares += section.view(block.units, -1).sum(1)
    return squares.sqrt()


def _dense(module: nn.Module) -> Tensor:
    """The weight as (out, in)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if kind_of(module) == "conv1d" else weight
