"""What is known of a model's linear maps before sharing: the moments of their inputs, and of the answer's slopes."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from layershare.sharing.sensitivity import Answer, sensitivities
from layershare.sharing.statistics import Batch, Grams, collect
from layershare.stacks import find_stacks


class Moments(NamedTuple):
    """By name of the linear module."""

    inputs: Grams = {}  # noqa: RUF012 - never written to
    """E[x x^T] of the inputs, (in, in)."""
    slopes: Grams = {}  # noqa: RUF012
    """The moments of the answer's gradients, (out, out); empty: errors count at the map's own output."""


def measure(
    model: Any, batches: Iterable[Batch], *, modules: Sequence[str] | None = None,
    answer: Answer | None = None, slopes: bool = True, seed: int = 0,
) -> Moments:  # fmt: skip
    """Both moments of ``modules`` (default: every linear map in the model's stacks) on the same ``batches``.

    ``slopes=False`` leaves those of the answer out, which cost a backward pass. ``answer``, ``seed``: see
    :func:`~layershare.sharing.sensitivity.sensitivities`.
    Raises DataError if the batches do not use a module, ModelError if a number is not finite.
    """
    batches = list(batches)
    if modules is None:
        modules = linear_maps(model)
    inputs = collect(model, modules, batches)  # first: it refuses a model whose numbers are not finite
    steep = sensitivities(model, modules, batches, answer=answer, seed=seed) if slopes else {}
    return Moments(inputs, steep)


def linear_maps(model: Any) -> list[str]:
    """The names of all linear modules in the stacks of ``model`` that are not shared already."""
    return [
        f"{stack.name}.{position}.{weight.name}".rpartition(".")[0]
        for stack in find_stacks(model) if not stack.tied
        for position, layer in enumerate(stack.layers)
        for weight in layer if weight.factorable
    ]  # fmt: skip
