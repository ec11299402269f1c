"""Zeros that stay zero while a model trains, whatever trains it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from layershare.errors import ModelError, OptionError
from layershare.stacks import Stack, find_stacks

MARK = "layershare_pruned"
"""The config field that says what was zeroed: {"weights": .., "heads": ..}; stock transformers carries it along."""


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The zeros of a model that was pruned by zeroing: stored matrix -> mask, True where it is zero.

    Empty for a model without such a mark. The zeros are the mask: nothing else is stored, nothing has to be made
    permanent.
    """
    if not getattr(getattr(model, "config", None), MARK, None):
        return {}
    masks = {}
    for name, parameter in _matrices(model).items():
        zeros = parameter.detach() == 0
        if bool(zeros.any()):
            masks[name] = zeros
    return masks


@contextmanager
def held(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """While inside, pruned weights stay exactly zero, with any optimizer, ``Trainer`` or loop in this process.

    Their gradients are cut as they arrive, so that neither momentum nor the norm for clipping sees them, and after each
    optimizer step they are zeroed once more. masks: parameter name -> True where it stays zero; default those that the
    model was pruned with (:func:`masks_of`; for others this does nothing). Works on the stored parameters: ties stay.
    """
    chosen = dict(masks_of(model) if masks is None else masks)
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    for name, mask in chosen.items():
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise OptionError(f"the masks name {name!r}, which the model does not have.") from None
        if mask.shape != parameter.shape:
            raise ModelError(
                f"the mask of {name} has shape {list(mask.shape)}, its weight {list(parameter.shape)}."
            )
        pairs.append((parameter, mask.to(device=parameter.device, dtype=torch.bool)))

    @torch.no_grad()
    def again(*_: Any) -> None:
        for parameter, mask in pairs:
            parameter.masked_fill_(mask.to(parameter.device), 0)

    def cutting(mask: Tensor) -> Any:
        return lambda grad: grad.masked_fill(mask.to(grad.device), 0)

    again()
    handles: list[Any] = [p.register_hook(cutting(mask)) for p, mask in pairs if p.requires_grad]
    handles.append(register_optimizer_step_post_hook(again))
    try:
        yield chosen
        again()
    finally:
        for handle in handles:
            handle.remove()


def sparsity(model: nn.Module, stacks: Iterable[str] | None = None) -> tuple[int, int]:
    """(zeros, all) of the weights in the matrices of the layers, each stored one counted once. stacks: default all."""
    counts = [(int((p == 0).sum()), p.numel()) for p in _matrices(model, stacks).values()]
    return sum(zeros for zeros, _ in counts), sum(size for _, size in counts)


def stacks_of(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a model, also when one layer is all that is left of them."""
    try:
        return find_stacks(model)
    except ModelError:
        single = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 1]
        return find_stacks(model, single)


def _matrices(model: nn.Module, stacks: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    names = [stack.name for stack in stacks_of(model)] if stacks is None else stacks
    inside = tuple(f"{name}." for name in names)
    return {name: p for name, p in model.named_parameters() if name.startswith(inside) and p.dim() >= 2}
