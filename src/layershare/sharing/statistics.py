"""Second moments of activations: what a linear map sees, measured on a few hundred calibration texts."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from layershare.errors import DataError

Grams = dict[str, Tensor]
Batch = Mapping[str, Any]


@torch.no_grad()
def collect(model: nn.Module, modules: Iterable[str], batches: Iterable[Batch]) -> Grams:
    """E[x x^T] of the inputs of the named linear ``modules``, each (in, in) in float32, over all unmasked tokens.

    ``batches`` are given to the model as ``model(**batch)``; a two-dimensional ``attention_mask`` tells padding.
    Raises DataError if a module sees no token.
    """
    modules = list(modules)
    sums: Grams = {}
    seen: dict[str, int] = {}
    mask: list[Tensor | None] = [None]
    runs = 0

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple) -> None:
            rows = _rows(args[0], mask[0]).float()
            sums[name] = sums[name] + rows.T @ rows if name in sums else rows.T @ rows
            seen[name] = seen.get(name, 0) + len(rows)

        return hook

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        with ExitStack() as hooks:
            for name in modules:
                handle = model.get_submodule(name).register_forward_pre_hook(watch(name))
                hooks.callback(handle.remove)
            for batch in batches:
                runs += 1
                batch = {
                    key: value.to(device) if isinstance(value, Tensor) else value
                    for key, value in batch.items()
                }
                mask[0] = batch.get("attention_mask")
                model(**batch)
    finally:
        model.train(was_training)
    if unseen := [name for name in modules if not seen.get(name)]:
        where = f"never reaches {unseen[0]}" if runs else "has no batch"
        raise DataError(
            f"the calibration data {where}.", "Give batches that use every shared part of the model."
        )
    return {name: total / seen[name] for name, total in sums.items()}


def _rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs (..., in) as rows; those of padding left out where the mask has their shape."""
    if mask is not None and inputs.shape[:-1] == mask.shape:
        return inputs[mask.bool()]
    return inputs.flatten(0, -2)
