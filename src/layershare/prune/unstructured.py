"""Zero single weights: every shared one scored, counted and cut once. The zeros themselves are the mask.

``torch.nn.utils.prune`` re-parametrises each module for itself, which unties shared weights; here the stored parameters
are set to zero in place and :func:`layershare.prune.masks.held` keeps them there while a model trains.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.errors import DataError, ModelError, OptionError, nearest
from layershare.linear import FACTORS, AtomLinear, FactoredLinear, kind_of
from layershare.prune.config import PruneConfig
from layershare.prune.importance import Batch, Loss, gradients, run, wanda
from layershare.prune.select import lowest, lowest_in_rows, n_of_m, within_energy
from layershare.sharing.layout import matches
from layershare.sharing.padding import Mask, rows_of
from layershare.stacks import PARTS, Stack


@dataclass(frozen=True)
class Target:
    """A stored matrix: its parameter, the first name of it, and every (module, leaf) that uses it."""

    name: str
    parameter: nn.Parameter
    uses: tuple[tuple[str, str], ...]
    flipped: bool
    """Whether it is (in, out), as in a Conv1D."""
    linear: bool

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (outputs, inputs)."""
        return tensor.flatten(0, -2).T if self.flipped else tensor.flatten(0, -2)

    def back(self, tensor: Tensor) -> Tensor:
        """The reverse of :meth:`rows`."""
        return (tensor.T if self.flipped else tensor).reshape(self.parameter.shape)


def targets(model: nn.Module, stacks: Sequence[Stack], parts: Sequence[str]) -> dict[str, Target]:
    """The matrices of these parts (names or globs), each stored one once, by its first name.

    Norms, biases, gates and embeddings are never among them. Raises OptionError naming a part that matches none.
    """
    found: dict[int, Target] = {}
    unused = set(parts) - set(PARTS)
    for stack in stacks:
        for position, layer in enumerate(stack.layers):
            for weight in layer:
                hit = [part for part in parts if matches(weight, part)]
                if not hit or weight.part == "norm" or len(weight.shape) < 2:
                    continue
                unused -= set(hit)
                path, _, leaf = f"{stack.name}.{position}.{weight.name}".rpartition(".")
                module = model.get_submodule(path)
                if isinstance(module, nn.Embedding):  # T5's position biases
                    continue
                if isinstance(module, AtomLinear):
                    raise ModelError(
                        f"{path} is mixed of shared atoms: it cannot lose weights.", "Unshare it first."
                    )
                leaves = FACTORS if isinstance(module, FactoredLinear) and leaf == "weight" else (leaf,)
                for one in leaves:
                    if (
                        parameter := module._parameters.get(one)
                    ) is None or parameter.dim() < 2:  # a diagonal stays
                        continue
                    plain = kind_of(module) != "other"
                    old = found.get(id(parameter))
                    uses = (*(old.uses if old else ()), (path, one))
                    flipped = one == "weight" and kind_of(module) == "conv1d"
                    found[id(parameter)] = Target(
                        old.name if old else f"{path}.{one}", parameter, uses, flipped, plain
                    )
    if unused:
        names = {weight.name for stack in stacks for layer in stack.layers for weight in layer}
        raise OptionError(
            f"part {min(unused)!r} matches no matrix.", nearest(min(unused), [*PARTS, *sorted(names)])
        )
    if not found:
        raise OptionError(f"the layers have no matrix in {', '.join(parts)}.")
    return {target.name: target for target in found.values()}


def scores(
    model: nn.Module,
    chosen: Mapping[str, Target],
    by: str,
    batches: Sequence[Batch],
    loss: Loss,
    alpha: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The importance of every weight, float32, by the name of its matrix; its square is the weight's energy.

    magnitude: |w|. wanda: |w| times the norm of its input over the real tokens of all uses (squares are summed, as
    if the tokens of all uses were one batch). taylor: |w * dL/dw|, the gradient summed over uses. alpha: an importance
    by name, of the matrix's shape or one for all its weights: sqrt(alpha) * |w|. Matrices not named have 1.
    """
    if alpha is not None:
        _check_alpha(alpha, chosen)
        ones = torch.ones(())
        return {
            n: t.parameter.detach().abs().float() * alpha.get(n, ones).to(t.parameter.device).float().sqrt()
            for n, t in chosen.items()
        }
    if by == "magnitude":
        return {n: t.parameter.detach().abs().float() for n, t in chosen.items()}
    if by == "taylor":
        slopes = gradients(model, {n: t.parameter for n, t in chosen.items()}, batches, loss)
        return {n: (slopes[n] * t.parameter.detach().float()).abs() for n, t in chosen.items()}
    if odd := next((t for t in chosen.values() if not t.linear), None):
        raise ModelError(
            f"{odd.name} is no plain linear map: wanda does not know its inputs.", "Leave it out of parts."
        )
    squares = input_squares(model, chosen, batches)
    return {
        n: t.back(wanda(t.rows(t.parameter.detach()).float(), squares[n].float())) for n, t in chosen.items()
    }


def _check_alpha(alpha: Mapping[str, Tensor], chosen: Mapping[str, Target]) -> None:
    for name, value in alpha.items():
        if name not in chosen:
            raise OptionError(
                f"the given importance names {name!r}, which is not pruned.", nearest(name, chosen)
            )
        if value.shape not in ((), chosen[name].parameter.shape):
            shapes = f"{list(value.shape)} instead of {list(chosen[name].parameter.shape)}"
            raise OptionError(f"the given importance of {name} has shape {shapes}.")
        if not bool((value >= 0).all()):
            raise OptionError(f"the given importance of {name} is negative or not a number.")


def input_squares(
    model: nn.Module, chosen: Mapping[str, Target], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """The sum of x_j^2 of each input of each matrix, float64, over the real tokens of all its uses."""
    sums: dict[str, Tensor] = {}
    mask: list[Mask] = []

    def watch(name: str, leaf: str) -> Callable[..., Any]:
        def hook(module: Any, args: tuple) -> None:
            x = rows_of(args[0].detach(), mask[0])
            read = module.read_by(leaf, x) if isinstance(module, FactoredLinear) else x
            squares = read.double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(watch(name, leaf))
        for name, target in chosen.items()
        for path, leaf in target.uses
    ]
    run(model, batches, None, handles, mask)
    if unseen := [name for name in chosen if name not in sums]:
        raise DataError(
            f"the batches never reach {unseen[0]}.", "Give batches that use every part of the model."
        )
    return sums


def select(
    found: Mapping[str, Tensor], chosen: Mapping[str, Target], config: PruneConfig
) -> dict[str, Tensor]:
    """Masks (True: goes) of the weights that ``config`` removes, by matrix. Pure: scores in, masks out.

    Raises OptionError if all weights of a matrix or model would go, none, or N:M does not divide the inputs.
    """
    total = sum(score.numel() for score in found.values())
    if config.pattern is not None:
        n, m = config.n_of_m
        masks = {
            name: chosen[name].back(n_of_m(chosen[name].rows(s), n, m, name)) for name, s in found.items()
        }
    elif config.scope == "layer":
        masks = {name: lowest(s, _count(config, s.numel())) for name, s in found.items()}
    elif config.scope == "row":
        rows = {name: chosen[name].rows(s) for name, s in found.items()}
        masks = {n: chosen[n].back(lowest_in_rows(s, _count(config, s.shape[1]))) for n, s in rows.items()}
    else:
        flat = torch.cat([score.flatten() for score in found.values()])
        if config.threshold is not None:
            energy = flat.double().square()
            limit = config.threshold * float(energy.sum()) if config.relative else config.threshold
            gone = within_energy(energy, limit)
        else:
            gone = lowest(flat, _count(config, total))
        sizes = [score.numel() for score in found.values()]
        parts = zip(found.items(), gone.split(sizes), strict=True)
        masks = {name: mask.view(score.shape) for (name, score), mask in parts}
    removed = sum(int(mask.sum()) for mask in masks.values())
    if removed == 0:
        raise OptionError("nothing would be pruned.", "Raise the amount or the threshold.")
    if removed == total:
        raise OptionError(f"all {total:,} weights would be pruned.", "Lower the amount or the threshold.")
    return masks


def _count(config: PruneConfig, size: int) -> int:
    amount = config.amount
    assert amount is not None
    count = amount if isinstance(amount, int) else math.floor(amount * size + 1e-9)
    if count >= size:
        raise OptionError(f"amount {amount:,} would prune all {size:,} weights.", "Lower it.")
    return count


@torch.no_grad()
def zero(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of ``model`` with zeros where ``masks`` are True. Shared parameters are one object, before and after."""
    new = copy.deepcopy(model)
    for name, mask in masks.items():
        parameter = new.get_parameter(name)
        parameter.masked_fill_(mask.to(parameter.device), 0)
    return new
