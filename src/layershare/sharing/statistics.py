"""Second moments of activations: what a linear map sees, measured on a few hundred calibration texts."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.errors import DataError, ModelError
from layershare.sharing.padding import Mask, padding_of, rows_of

Grams = dict[str, Tensor]
Batch = Mapping[str, Any]


def texts_in(batches: Iterable[Batch]) -> int:
    """How many texts (images, recordings) the batches have."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


@torch.no_grad()
def collect(model: nn.Module, modules: Iterable[str], batches: Iterable[Batch]) -> Grams:
    """E[x x^T] of the inputs of the named linear ``modules``, each (in, in) in float32, over all unmasked tokens.

    ``batches`` are given to the model as ``model(**batch)``; padding is left out, see :mod:`.padding`.
    Raises DataError if a module sees no token, ModelError if what it sees, or its weight, is not finite.
    """
    modules = list(modules)
    sums: Grams = {}
    seen: dict[str, int] = {}
    runs = 0
    end: nn.Module | None = None
    with evaluating(model):
        for batch in batches:
            runs += 1
            batch = to_device(model, batch)
            mask = padding_of(model, batch)
            latest: list[tuple[Tensor, int, Tensor, int]] = []  # queries, keys and values see one tensor

            def see(name: str, given: Tensor, mask: Mask = mask, latest: list = latest) -> None:
                version = 0 if given.is_inference() else given._version  # written in place meanwhile?
                if not latest or latest[0][0] is not given or latest[0][1] != version:
                    rows = rows_of(given, mask).float()
                    latest[:] = [(given, version, rows.T @ rows, len(rows))]
                *_, gram, count = latest[0]
                sums[name] = sums[name] + gram if name in sums else gram
                seen[name] = seen.get(name, 0) + count

            end = _run(model, modules, batch, see, end)
    refuse_unseen(modules, seen, runs)
    refuse_infinite(model, sums)
    return {name: total / seen[name] for name, total in sums.items()}


@torch.no_grad()
def order_of_calls(
    model: nn.Module, modules: Sequence[str], batches: Sequence[Batch], needed: Collection[str] | None = None
) -> list[list[str]]:
    """The names of ``modules`` in the order in which ``model`` first calls them; those that see one tensor together.

    As many batches are run as it takes. Raises DataError if a module (one of those ``needed``, if given) is not called.
    """
    needed = modules if needed is None else needed
    calls: list[tuple[str, Tensor]] = []  # the tensors are kept, so that no two of them have one identity
    steps: dict[int, list[str]] = {}
    done: set[str] = set()
    runs = 0

    def see(name: str, rows: Tensor) -> None:
        if name not in done:
            done.add(name)
            calls.append((name, rows))
            steps.setdefault(id(rows), []).append(name)

    with evaluating(model):
        for batch in batches:
            runs += 1
            _run(model, modules, to_device(model, batch), see)
            if done >= set(modules):
                break
    refuse_unseen([name for name in modules if name in needed], dict.fromkeys(done, 1), runs)
    return list(steps.values())


def _run(
    model: nn.Module, modules: Sequence[str], batch: Batch, see: Callable[[str, Tensor], None],
    end: nn.Module | None = None,
) -> nn.Module | None:  # fmt: skip
    """Run ``model``, as far as ``end`` if given, and let ``see`` see the name and the input of each module.

    Returns where the next run may end: at the output layer, the costliest of a model with a large vocabulary, if no
    module was called behind it."""
    order: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple) -> None:
            order.append(name)
            see(name, args[0])

        return hook

    def stop(_: nn.Module, __: tuple) -> None:
        order.append("")
        if end is not None:
            raise Enough

    output = output_layer(model)
    with ExitStack() as hooks:
        for name in modules:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(watch(name)).remove)
        if output is not None:
            hooks.callback(output.register_forward_pre_hook(stop).remove)
        hooks.enter_context(suppress(Enough))
        model(**batch)
    return output if order.count("") == 1 and order[-1] == "" else None


def output_layer(model: nn.Module) -> nn.Module | None:
    """The map from hidden states to logits over a vocabulary, if the model has one."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


class Enough(Exception):  # noqa: N818 - no error
    """Ends a forward pass of which the rest is not needed."""


def to_device(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {k: value.to(device) if isinstance(value, Tensor) else value for k, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def refuse_unseen(modules: Sequence[str], seen: Mapping[str, int], runs: int) -> None:
    if unseen := [name for name in modules if not seen.get(name)]:
        where = f"never reaches {unseen[0]}" if runs else "has no batch"
        raise DataError(
            f"the calibration data {where}.", "Give batches that use every shared part of the model."
        )


def refuse_infinite(model: nn.Module, grams: Grams) -> None:
    for name, gram in grams.items():
        module: Any = model.get_submodule(name)
        if not bool(gram.isfinite().all()):
            what = f"what {name} reads"
        elif not bool(module.weight.isfinite().all()):
            what = f"{name}.weight"
        else:
            continue
        raise ModelError(
            f"{what} has numbers that are not finite.", "Was the model trained well, is its checkpoint whole?"
        )
