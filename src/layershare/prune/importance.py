"""Importances, measured where units pass: on the inputs of the map that reads them, or around a position.

A first-order Taylor score is that of a gate m on the unit: the change of the loss when it is closed is dL/dm at m = 1,
which is sum(a * dL/da) over its activations a and equals sum(w * dL/dw) over the weights that read it. (Molchanov et
al., 2016, 1611.06440; for heads Michel et al., 2019, 1905.10650.) Its absolute value is taken batch by batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layershare.errors import DataError, OptionError, TrainingError
from layershare.sharing.padding import Mask, padding_of, rows_of

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, dict[str, Any]], Tensor]
"""(model, batch) -> a scalar to differentiate."""


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos(h_in, h_out) of each token, (..., d) -> (...) (ShortGPT: Men et al., 2024, 2403.03853)."""
    return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)


def wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2 (Sun et al., 2023, 2306.11695): ``weight`` (out, in), ``squares`` the sums of x_j^2, (in)."""
    return weight.abs() * squares.sqrt()


def label_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's own loss; the batches must hold ``labels``.

    Raises OptionError if the model returns none.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise OptionError(
            f"importance 'taylor' needs a loss, and {type(model).__name__} gives none for these batches.",
            "Give labels in the batches, a teacher (the original of a shared model), or a loss function.",
        )
    return loss


def matching_loss(teacher: nn.Module) -> Loss:
    """1/2 * mean squared distance of the outputs (logits, or else last hidden states of real tokens) to ``teacher``'s.

    It needs no labels. The teacher must differ from the model: at itself all gradients are zero.
    """

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            theirs = _output(teacher(**batch))
        error = (_output(model(**batch)) - theirs).square().sum(-1)
        mask = padding_of(model, batch)(error.shape)
        if mask is not None:
            return (error * mask).sum() / mask.sum() / 2
        return error.mean() / 2

    return loss


def _output(outputs: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(outputs, name, None), Tensor):
            return found
    raise OptionError(
        f"{type(outputs).__name__} has neither logits nor last hidden states to match.", "Give a loss."
    )


def of_inputs(
    model: nn.Module, modules: Sequence[str], by: str, batches: Iterable[Batch], loss: Loss
) -> dict[str, Tensor]:
    """The importance of each input feature of the named linear ``modules``: ``activation`` gives the mean square over
    tokens, ``wanda`` the sum of squares, both over real tokens; ``taylor`` the gate gradients, (batches, in), signed.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    tokens = dict.fromkeys(modules, 0)

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple) -> None:
            x = args[0]
            if by == "taylor":
                x.register_hook(
                    lambda grad: found[name].append((grad * x.detach()).flatten(0, -2).double().sum(0))
                )
                return
            rows = rows_of(x.detach(), mask[0])
            found[name].append(rows.double().square().sum(0))
            tokens[name] += len(rows)

        return hook

    mask: list[Mask] = []
    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in modules]
    run(model, batches, loss if by == "taylor" else None, handles, mask)
    if unseen := [name for name in modules if not found[name]]:
        raise DataError(
            f"the batches never reach {unseen[0]}.", "Give batches that use every part of the model."
        )
    if by == "taylor":
        return {name: torch.stack(rows) for name, rows in found.items()}
    scale = {name: tokens[name] if by == "activation" else 1 for name in modules}
    return {name: torch.stack(rows).sum(0) / scale[name] for name, rows in found.items()}


def of_positions(
    model: nn.Module, layers: Sequence[str], by: str, batches: Iterable[Batch], loss: Loss
) -> dict[str, float]:
    """The importance of each use of a layer: ``influence``, ``activation`` (mean relative length of its update) or
    ``taylor`` (of the gate g in ``h + g * (layer(h) - h)`` at 1).
    """
    found: dict[str, list[float]] = {name: [] for name in layers}
    weights: dict[str, list[int]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if by == "taylor":
                change = (after - before).detach()
                after.register_hook(
                    lambda grad: found[name].append(abs(float((grad * change).double().sum())))
                )
                weights[name].append(1)
                return
            a, b = rows_of(before.detach(), mask[0]), rows_of(after.detach(), mask[0])
            relative = (b - a).float().norm(dim=-1) / a.float().norm(dim=-1)
            score = block_influence(a, b) if by == "influence" else relative
            found[name].append(float(score.double().sum()))
            weights[name].append(len(a))

        return hook

    mask: list[Mask] = []
    handles = [
        model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True) for name in layers
    ]
    run(model, batches, loss if by == "taylor" else None, handles, mask)
    if unseen := [name for name in layers if not found[name]]:
        raise DataError(
            f"the batches never reach {unseen[0]}.", "Give batches that use every part of the model."
        )
    return {name: sum(found[name]) / sum(weights[name]) for name in layers}


def gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Batch], loss: Loss
) -> dict[str, Tensor]:
    """The mean over batches of dL/dw of each parameter, float32; the gradient of a shared one sums over its uses."""
    found: dict[str, Tensor] = {}

    def take() -> None:
        for name, p in parameters.items():
            found[name] = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float()

    count = run(model, batches, loss, [], [], finish=take)
    return {name: grad / count for name, grad in found.items()}


def run(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss | None,
    handles: Sequence[Any],
    mask: list[Mask],
    finish: Callable[[], None] | None = None,
) -> int:
    """Run all ``batches`` in evaluation mode, forward or with the gradient of ``loss``; then take the hooks off.

    The model is left as it was: its mode, its gradients and what is frozen. Returns how many batches there were.
    """
    was_training, device, count = model.training, next(model.parameters()).device, 0
    before = [(p, p.grad, p.requires_grad) for p in model.parameters()] if loss is not None else []
    model.eval()
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(True)
        for batch in batches:
            moved = {
                key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()
            }
            mask[:] = [padding_of(model, moved)]
            with torch.set_grad_enabled(loss is not None):
                if loss is None:
                    model(**moved)
                else:
                    value = loss(model, moved)
                    if not bool(torch.isfinite(value)):
                        raise TrainingError("The loss is not a finite number: no importance follows from it.")
                    value.backward()
            count += 1
        if finish is not None:
            finish()
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
        for parameter, grad, wanted in before:
            parameter.grad = grad
            parameter.requires_grad_(wanted)
    if not count:
        raise DataError("there is no batch to measure importance on.", "Give batches, or prune by magnitude.")
    return count
