"""Find what can be cut: the heads of every attention and the neurons of every FFN, by structure and by looking.

An FFN is a linear map that reads exactly the features which one map before it (two, or one of double width, if it is
gated) writes. An attention is found by running the model once with an attention function that only writes down what it
is given: the maps that ran before it inside its module wrote the heads, the next map to read them all is its output.
No model is named.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from layershare.architectures.inputs import find_inputs
from layershare.errors import ModelError
from layershare.linear import FactoredLinear, kind_of
from layershare.stacks import Stack

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """Units side by side: ``out`` reads them, ``ins`` write them.

    A unit is a neuron, or a head with its key and value (a key-value head with all heads that use it). It takes
    ``width`` neighbouring input features of ``out``. A map of ``ins``, (name, feature counts), writes one or more
    sections; in each the units stand in the same order, each with an equal share.
    """

    kind: str
    stack: str
    position: int
    out: str
    ins: tuple[tuple[str, tuple[int, ...]], ...]
    units: int
    width: int = 1
    heads: int = 0
    """Query heads: units times the heads in each."""

    @property
    def place(self) -> str:
        """Where in its layer the block is; blocks of equal place in different positions correspond."""
        return self.out.removeprefix(f"{self.stack}.{self.position}.")

    def columns(self, units: Tensor) -> Tensor:
        """Input features of ``out`` that belong to ``units`` (indices)."""
        return _expand(units, self.width)

    def rows(self, map_: int, units: Tensor) -> Tensor:
        """Output features of the map number ``map_`` of ``ins`` that belong to ``units``."""
        found, start = [], 0
        for size in self.ins[map_][1]:
            found.append(start + _expand(units, size // self.units))
            start += size
        return torch.cat(found)


def _expand(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def probe_inputs(model: PreTrainedModel, batches: Sequence[Inputs] | None) -> Inputs:
    """Two rows of the first batch, or inputs made for this kind of model. Raises ModelError if none are found."""
    if batches:
        device = next(model.parameters()).device
        return {k: v[:2].to(device) if isinstance(v, Tensor) else v for k, v in batches[0].items()}
    try:
        with torch.random.fork_rng():
            return find_inputs(model)[0]
    except Exception as error:
        raise ModelError(
            f"no inputs are known that {type(model).__name__} runs on.", "Give batches."
        ) from error


def find_neurons(model: PreTrainedModel, stack: Stack, inputs: Inputs) -> list[Block]:
    """The FFN blocks of every position. Raises ModelError if there is none."""
    found: list[Block] = []
    for position, layer in enumerate(stack.layers):
        pending: list[tuple[str, int, int]] = []
        done: list[tuple[str, int, int]] = []
        for weight in layer:
            if weight.part != "ffn" or weight.kind == "other":
                continue
            name = f"{stack.name}.{position}.{weight.name.rpartition('.')[0]}"
            rows, columns = weight.shape[::-1] if weight.kind == "conv1d" else weight.shape
            late = [b for b in found if b.position == position and b.units == rows and _near(b.out, name)]
            if late and done and done[-1][2] == columns and len(late[-1].ins) == 1 and not pending:
                # a gated FFN that names its gate last
                found[found.index(late[-1])] = replace(late[-1], ins=(*late[-1].ins, (name, (rows,))))
                continue
            writers = [
                (n, r) for n, r, c in pending if r in (columns, 2 * columns) and c == rows and _near(n, name)
            ]
            if not writers:
                pending.append((name, rows, columns))
                continue
            doubled = len(writers) == 1 and writers[0][1] == 2 * columns
            ins = tuple((n, (columns, columns) if doubled else (r,)) for n, r in writers)
            found.append(Block("neurons", stack.name, position, name, ins, columns))
            pending, done = [], [*done, (name, columns, rows)]
    if not found:
        raise ModelError(
            f"the layers of {stack.name!r} have no FFN of plain linear maps: no neurons are found."
        )
    return _settled(model, found, inputs)


def _near(name: str, other: str) -> bool:
    """In one module or in sibling modules (BERT's ``intermediate.dense`` and ``output.dense``)."""
    a, b = name.split("."), other.split(".")
    return a[:-1] == b[:-1] or a[:-2] == b[:-2]


def find_heads(model: PreTrainedModel, stack: Stack, inputs: Inputs) -> list[Block]:
    """The attention blocks of every position. Raises ModelError if the model's attention cannot be looked at."""
    names = {id(module): name for name, module in model.named_modules()}
    events: list[tuple] = []

    def look(module: nn.Module, query: Tensor, _key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple:
        events.append((names.get(id(module), ""), query.shape[1], query.shape[-1], value.shape[-1]))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    def ran(name: str) -> Any:
        return lambda module, *_: events.append((name, *reversed(_shape(module))))

    maps = {
        n: m for n, m in model.named_modules() if n.startswith(f"{stack.name}.") and kind_of(m) != "other"
    }
    handles = [module.register_forward_hook(ran(name)) for name, module in maps.items()]
    try:
        with torch.no_grad(), _attention(look):
            _evaluated(model, inputs)
    except Exception as error:
        raise ModelError(f"the attention of {type(model).__name__} cannot be looked at ({error}).") from error
    finally:
        for handle in handles:
            handle.remove()
    found = list(_blocks(events, stack))
    if not found:
        raise ModelError(
            f"no attention of {stack.name!r} uses transformers' attention interface: no heads are found."
        )
    return _settled(model, found, inputs)


def _blocks(events: Sequence[tuple], stack: Stack) -> Iterator[Block]:
    start = 0
    for i, event in enumerate(events):
        if len(event) != 4 or not event[0].startswith(f"{stack.name}."):
            continue
        module, heads, size, value_size = event
        wrote = [(e[0], e[2]) for e in events[start:i] if len(e) == 3 and e[0].startswith(f"{module}.")]
        start = i
        reader = next((e for e in events[i:] if len(e) == 3 and e[1] == heads * value_size), None)
        wrote = [
            (name, rows) for name, rows in dict.fromkeys(wrote) if rows % size == 0 or rows % value_size == 0
        ]
        if reader is None or not wrote:
            raise ModelError(
                f"the maps around the attention of {module} are not plain linear ones.", "Heads stay."
            )
        q = heads * size
        least = min(rows for _, rows in wrote)
        if len(wrote) == 1 and least > q:  # query, key and value in one map
            shared = (least - q) // (size + value_size)
            ins: list[tuple[str, tuple[int, ...]]] = [(wrote[0][0], (q, shared * size, shared * value_size))]
        elif len(wrote) == 2 and max(rows for _, rows in wrote) > q:  # key and value in one map
            shared = heads
            ins = [(n, (rows,) if rows == q else (rows // 2, rows // 2)) for n, rows in wrote]
        else:
            shared = least // size if least % size == 0 and heads % max(least // size, 1) == 0 else heads
            ins = [(n, (rows,)) for n, rows in wrote]
        position = int(module.removeprefix(f"{stack.name}.").partition(".")[0])
        width = heads // shared * value_size
        yield Block("heads", stack.name, position, reader[0], tuple(ins), shared, width, heads)


def _settled(model: PreTrainedModel, blocks: Sequence[Block], inputs: Inputs) -> list[Block]:
    """Where one map writes several kinds of features, in sections or unit by unit, the model itself shows the order.

    It is looked up in one position of each place.
    """
    order: dict[tuple, bool] = {}
    found = []
    for block in blocks:
        by_unit = replace(block, ins=tuple((name, (sum(sections),)) for name, sections in block.ins))
        if by_unit.ins == block.ins or block.units == 1:
            found.append(block)
            continue
        key = (block.stack, block.place, tuple(sections for _, sections in block.ins))
        if key not in order:
            in_sections = _silences(model, block, inputs)
            if not in_sections and not _silences(model, by_unit, inputs):
                raise ModelError(
                    f"the order of the features around {block.out} is not understood: they stay."
                )
            order[key] = in_sections
        found.append(block if order[key] else by_unit)
    return found


def _silences(model: PreTrainedModel, block: Block, inputs: Inputs) -> bool:
    """Whether one unit, and no other, falls silent at the reader when all that is thought to write it does."""
    before = _loud(model, block, inputs, None)
    unit = int(before.int().argmax())
    after = _loud(model, block, inputs, unit)
    wanted = before.clone()
    wanted[unit] = False
    return bool(before.any()) and bool((after == wanted).all())


def _loud(model: PreTrainedModel, block: Block, inputs: Inputs, silent: int | None) -> Tensor:
    """Which units are not zero throughout at the reader, (units), when the writers of unit ``silent`` give zeros."""
    seen: list[Tensor] = []

    def quiet(number: int) -> Any:
        rows = block.rows(number, torch.tensor([silent]))
        return lambda _module, _args, output: output.index_fill(-1, rows.to(output.device), 0)

    def listen(_module: nn.Module, args: tuple) -> None:
        seen.append((args[0].reshape(-1, block.units, block.width) != 0).any(dim=2).any(dim=0))

    handles: list[Any] = [model.get_submodule(block.out).register_forward_pre_hook(listen)]
    if silent is not None:
        writers = [model.get_submodule(name) for name, _ in block.ins]
        handles += [writer.register_forward_hook(quiet(i)) for i, writer in enumerate(writers)]
    try:
        with torch.no_grad():
            _evaluated(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen).any(dim=0).cpu() if seen else torch.zeros(block.units, dtype=torch.bool)


@contextmanager
def _attention(function: Any) -> Iterator[None]:
    """Every attention of transformers is ``function`` for a while."""
    mapping = AttentionInterface._global_mapping
    before = dict(mapping)
    mapping.update(dict.fromkeys([*before, "eager"], function))
    try:
        yield
    finally:
        mapping.clear()
        mapping.update(before)


def _evaluated(model: PreTrainedModel, inputs: Inputs) -> Any:
    was_training = model.training
    model.eval()
    try:
        return model(**inputs)
    finally:
        model.train(was_training)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map of any kind."""
    if isinstance(module, FactoredLinear):
        return module.out_features, module.in_features
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (columns, rows) if kind_of(module) == "conv1d" else (rows, columns)
