"""How much the model's answer moves when the output of a linear map does: second moments of gradients.

To second order, replacing W by W' in one linear map changes the answer by E|g^T (W - W') x|^2 summed over the answer's
directions, with x the map's input and g the gradient of the answer at its output. With x and g taken as independent
(Kronecker factors: Martens and Grosse, 2015, 1503.05671) this is |T (W - W') S|_F^2, T T = E[g g^T], S S = E[x x^T], so
low-rank factors can be fitted to the *answer* instead of to the map's own output (generalised Fisher-weighted SVD:
Chekalina et al., 2025, 2505.17974). Unlike errors of weights or of activations, these errors are in one unit for all
maps of a model, so ranks can be compared across them; see :mod:`layershare.sharing.allocate`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layershare.errors import DataError
from layershare.sharing.padding import Mask, padding_of, rows_of
from layershare.sharing.pieces import pieces
from layershare.sharing.statistics import Batch, Grams

Answer = Callable[[nn.Module, Batch], tuple[Tensor, bool]]
"""A model's answer to a batch: vectors (..., d) and False, or logits (..., classes) and True."""
PROBES = 2


def sensitivities(
    model: nn.Module, modules: Iterable[str], batches: Iterable[Batch], *,
    answer: Answer | None = None, probes: int = PROBES, seed: int = 0,
) -> Grams:  # fmt: skip
    """Sum over a text's tokens, mean over texts, of g g^T: the gradients g at the outputs of the named linear
    ``modules``, each (out, out) in float32.

    ``batches`` are given to the model as ``model(**batch)``; padding is left out. ``answer`` tells what is to be
    preserved: default the logits where the model has them, else the last hidden states. Vectors are probed with
    Gaussian weights, ``probes`` times a batch: to second order this is their squared distance. Logits are probed with
    labels drawn from the model itself: twice the KL divergence (Fisher information). Weights and their ``grad`` stay as
    they are. Raises DataError if a module gets no gradient.
    """
    modules = list(modules)
    sums: Grams = {}
    texts = 0
    draw = torch.Generator().manual_seed(seed)

    def see(name: str, gradients: Tensor) -> None:
        rows = gradients.float()
        sums[name] = sums[name] + rows.T @ rows if name in sums else rows.T @ rows

    with _only_activations(model), torch.enable_grad():
        device = next(model.parameters()).device
        for batch in (piece for whole in batches for piece in pieces(model, whole)):
            batch = {
                k: value.to(device) if isinstance(value, Tensor) else value for k, value in batch.items()
            }
            texts += probes * next(len(value) for value in batch.values() if isinstance(value, Tensor))
            with _watching(model, modules, padding_of(model, batch), see):
                given, logits = (answer or _default)(model, batch)
                for probe, slope in enumerate(_slopes(given, logits, draw, probes)):
                    given.backward(slope, retain_graph=probe + 1 < probes)
    if not texts:
        raise DataError("the calibration data has no batch.", "Give some texts.")
    if unseen := [name for name in modules if name not in sums]:
        raise DataError(
            f"{unseen[0]} has no part in the model's answer to the calibration data.",
            "Give batches that use every shared part of the model.",
        )
    return {name: total / texts for name, total in sums.items()}


def _default(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    outputs = model(**batch)
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return rows_of(logits, padding_of(model, batch)), True
    # A loss, of labels that an encoder-decoder needs, is no answer.
    every = outputs if isinstance(outputs, tuple) else outputs.to_tuple()
    given = next(value for value in every if isinstance(value, Tensor) and value.ndim > 1)
    return rows_of(given, padding_of(model, batch)), False


@torch.no_grad()
def _slopes(answer: Tensor, logits: bool, draw: torch.Generator, probes: int) -> Iterator[Tensor]:
    """Gradients at the answer, whose squares downstream are in expectation the second-order change of the answer.

    Of logits it is that of the log-probability of a drawn label, written down: softmax and its sums are computed once
    for all probes, and nothing as wide as a vocabulary waits in a graph.
    """
    if not logits:
        for _ in range(probes):
            yield torch.randn(answer.shape, generator=draw).to(answer.device, answer.dtype)
        return
    chances = answer.float().softmax(-1)
    below = chances.cumsum(-1)
    for _ in range(probes):
        drawn = torch.rand(*answer.shape[:-1], 1, generator=draw).to(answer.device) * below[..., -1:]
        label = torch.searchsorted(below, drawn).clamp_max(answer.shape[-1] - 1)
        slope = chances.neg()
        yield slope.scatter_add_(-1, label, torch.ones_like(drawn)).to(answer.dtype)


@contextmanager
def _only_activations(model: nn.Module) -> Any:
    """Weights take no gradients meanwhile, and the model is in evaluation mode."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    model.eval()
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, want in wanted:
            parameter.requires_grad_(want)
        model.train(was_training)


@contextmanager
def _watching(
    model: nn.Module, modules: Sequence[str], mask: Mask, see: Callable[[str, Tensor], None]
) -> Any:
    def watch(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing before it takes gradients: the graph begins here
                output = output.detach().requires_grad_()
            output.register_hook(lambda gradient: see(name, rows_of(gradient, mask)))
            return output.clone()  # so that what follows may work in place

        return hook

    with ExitStack() as hooks:
        for name in modules:
            hooks.callback(model.get_submodule(name).register_forward_hook(watch(name)).remove)
        yield
