"""Embedding tables in two factors: V x H becomes V x E and E x H (ALBERT, Lan et al., 2019, 1909.11942).

The module stays what it is, of its own class, with a table of E columns: so what it does to its rows (Gemma scales
them), resizing for new tokens, and the tie of the output head go on as always. The second factor, ``down`` (E, H),
stands beside the table; a hook multiplies by it, behind an embedding (rows @ down) and before an output head that uses
the same table (x @ down.T). All uses of one table hold the same two Parameters.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layershare.errors import DataError, ModelError, PlanError, nearest
from layershare.plan import SharingPlan, Table
from layershare.sharing.lowrank import balanced
from layershare.sharing.padding import Mask, padding_of
from layershare.stacks import same_stack

DOWN = "layershare_down"
# See gate.py: a number of its own, which survives pickling.
_KEY = -2


@dataclass(frozen=True)
class TableJob:
    """One table, factored or to be factored."""

    modules: tuple[str, ...]
    """Full names of the modules that use it: the embedding that the plan names, others, output heads."""
    rank: int
    rows: int
    columns: int
    itemsize: int

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Full names of the parameters that are one object, one tuple an object."""
        return tuple(tuple(f"{module}.{leaf}" for module in self.modules) for leaf in ("weight", DOWN))

    @property
    def saved_bytes(self) -> int:
        """What factoring saves; negative where the rank is too high to save anything."""
        return (self.rows * self.columns - self.rank * (self.rows + self.columns)) * self.itemsize


def tables_of(model: nn.Module, plan: SharingPlan) -> tuple[TableJob, ...]:
    """The tables of ``plan`` in ``model``, factored already or not. Works on the meta device.

    Raises PlanError if there is no such table or its rank is not below its width, ModelError if something else than
    an embedding or a linear output head uses it.
    """
    return tuple(_job(model, table) for table in plan.tables)


def _job(model: nn.Module, table: Table) -> TableJob:
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    found = [n for n in embeddings if n == table.name] or [n for n in embeddings if same_stack(n, table.name)]
    if len(found) != 1:
        raise PlanError(f"the model has no embedding table {table.name!r}.", nearest(table.name, embeddings))
    name = found[0]
    module = model.get_submodule(name)
    weight, down = module.get_parameter("weight"), module._parameters.get(DOWN)
    columns = weight.shape[1] if down is None else down.shape[1]
    if table.rank >= columns:
        raise PlanError(f"rank {table.rank} is not below the width of {name} [{len(weight)}, {columns}].")
    users = _users(model, f"{name}.weight")
    for user in (name, *users):
        _check(model.get_submodule(user), user)
    return TableJob((name, *users), table.rank, len(weight), columns, weight.element_size())


def _users(model: nn.Module, weight: str) -> list[str]:
    """The other modules that hold the parameter, or will once transformers has tied it."""
    parameter = model.get_parameter(weight)
    declared: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    root = declared.get(weight, weight)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    names += [root, *(target for target, source in declared.items() if source == root)]
    return [n.rpartition(".")[0] for n in dict.fromkeys(names) if n != weight]


def _check(module: nn.Module, name: str) -> None:
    if not isinstance(module, nn.Embedding | nn.Linear) or getattr(module, "max_norm", None) is not None:
        raise ModelError(
            f"{name} ({type(module).__name__}) uses the table in a way that no factors can follow."
        )


def install_tables(model: nn.Module, jobs: Iterable[TableJob]) -> None:
    """Give the modules of each table its two factors, values not set, and their hooks. Works on the meta device."""
    for job in jobs:
        old = model.get_submodule(job.modules[0]).get_parameter("weight")
        table, down = (
            nn.Parameter(
                torch.empty(*shape, dtype=old.dtype, device=old.device), requires_grad=old.requires_grad
            )
            for shape in ((job.rows, job.rank), (job.rank, job.columns))
        )
        for name in job.modules:
            module = model.get_submodule(name)
            module._parameters["weight"] = table
            module.register_parameter(DOWN, down)
            if isinstance(module, nn.Embedding):
                module._forward_hooks[_KEY] = _after
                module._forward_hooks.move_to_end(_KEY, last=False)  # type: ignore[attr-defined]
            else:
                module._forward_pre_hooks[_KEY] = _before
        for name in job.modules[
            1:
        ]:  # transformers asks every module when it saves; the table's own tie it knows
            model.get_submodule(name)._tied_weights_keys = {DOWN: DOWN}  # type: ignore[assignment]


def remove_tables(model: nn.Module, jobs: Iterable[TableJob]) -> None:
    """The reverse: one dense table for all its users."""
    for job in jobs:
        first = model.get_submodule(job.modules[0])
        weight, down = first.get_parameter("weight"), first.get_parameter(DOWN)
        dense = nn.Parameter((weight @ down).detach(), requires_grad=weight.requires_grad)
        for name in job.modules:
            module = model.get_submodule(name)
            module._parameters["weight"] = dense
            del module._parameters[DOWN]
            hooks = module._forward_hooks if isinstance(module, nn.Embedding) else module._forward_pre_hooks
            hooks.pop(_KEY, None)
            module.__dict__.pop("_tied_weights_keys", None)


def lost_tables(model: nn.Module, jobs: Iterable[TableJob]) -> list[str]:
    """Names of second factors that are gone or not in use."""
    lost = []
    for job in jobs:
        for name in job.modules:
            module = model.get_submodule(name)
            hooked = _KEY in (
                module._forward_hooks if isinstance(module, nn.Embedding) else module._forward_pre_hooks
            )
            if module._parameters.get(DOWN) is None or not hooked:
                lost.append(f"{name}.{DOWN}")
    return lost


def factor_table(table: Tensor, rank: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``up`` (V, rank) and ``down`` (rank, H) that minimise sum_v f_v |e_v - up_v @ down|^2 over the rows e_v (H).

    ``counts`` (V): how often each token was seen; f_v = count + 1, so that tokens not seen count a little. Without
    them all tokens count alike. Exact at rank H. Factors come back balanced, as those of linear maps.
    """
    dense = table.double()
    often = torch.ones(len(dense), dtype=dense.dtype, device=dense.device)
    if counts is not None:
        often = often + counts.to(often)
    # Eigenvectors of H x H instead of singular vectors of V x H: V is large.
    _, vectors = torch.linalg.eigh(dense.T @ (dense * often[:, None]))
    down = vectors[:, -rank:].flip(1).T
    up, down = balanced(dense @ down.T, down)
    return up.to(table.dtype), down.to(table.dtype)


@torch.no_grad()
def count_tokens(model: nn.Module, job: TableJob, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """How often each row of the table is looked up, (V) in float64, padding left out. Raises DataError if it never
    is."""
    counts = torch.zeros(job.rows, dtype=torch.float64)
    mask: list[Mask] = []

    def see(_: nn.Module, args: tuple) -> None:
        ids = args[0]
        if (real := mask[0](ids.shape)) is not None:
            ids = ids[real]
        counts.add_(torch.bincount(ids.flatten().cpu(), minlength=job.rows)[: job.rows])

    embeddings = [m for name in job.modules if isinstance(m := model.get_submodule(name), nn.Embedding)]
    device = next(model.parameters()).device
    with ExitStack() as hooks:
        for module in dict.fromkeys(embeddings):
            hooks.callback(module.register_forward_pre_hook(see).remove)
        for batch in batches:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            mask[:] = [padding_of(model, batch)]
            model(**batch)
    if not counts.sum():
        raise DataError(f"the calibration data never reaches {job.modules[0]}.", "Give batches of token ids.")
    return counts


def solve_table(
    job: TableJob, read: Callable[[str], Tensor], counts: Tensor | None = None
) -> dict[str, Tensor]:
    """The values of both factors of a table, by name."""
    name = job.modules[0]
    up, down = factor_table(read(f"{name}.weight"), job.rank, counts)
    return {f"{name}.weight": up, f"{name}.{DOWN}": down}


def main_table(model: nn.Module) -> str:
    """The name of the model's input embeddings. Raises ModelError if it has none that can be factored."""
    get = getattr(model, "get_input_embeddings", None)
    module = get() if get is not None else None
    for name, found in model.named_modules():
        if found is module and isinstance(found, nn.Embedding):
            return name
    raise ModelError(f"{type(model).__name__} has no table of token embeddings.")


def _after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:  # noqa: ARG001
    return output @ module.get_parameter(DOWN).to(output.dtype)


def _before(module: nn.Module, args: tuple) -> tuple:
    return (args[0] @ module.get_parameter(DOWN).to(args[0].dtype).T, *args[1:])
