"""Where modules go: found by the structure of the layers, never by names of models.

Inside a layer, each attention and the FFN end in the linear map that writes back into the residual stream: the last one
of its part that is as wide as the stream. Its output is taken before dropout, residual and norm. The maps before it
read the stream: queries, keys and values in attention, the first half of the FFN.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from layershare.errors import ModelError, OptionError
from layershare.plan import SharingPlan
from layershare.sharing import plan_of
from layershare.sharing.tie import layout_of
from layershare.stacks import Weight, find_stacks


@dataclass(frozen=True)
class Place:
    """A linear map inside the layers: full name of its module, its sizes, and whether it ends its part."""

    module: str
    part: str
    ends: bool
    in_features: int
    out_features: int


def places(model: nn.Module) -> tuple[Place, ...]:
    """All linear maps of attentions and FFNs in the stacks of ``model``, in the order of its modules."""
    return tuple(
        place
        for stack in find_stacks(model)
        for position, layer in enumerate(stack.layers)
        for place in _of_layer(f"{stack.name}.{position}", layer)
    )


def ends(model: nn.Module, parts: Sequence[str]) -> list[Place]:
    """The maps whose output goes back into the residual stream. ModelError where a part has none, or many at once."""
    _refuse_experts(model, parts)
    found = [place for place in places(model) if place.ends and place.part in parts]
    for part in parts:
        if not any(place.part == part for place in found):
            raise ModelError(
                f"no layer of {type(model).__name__} has a linear map that ends its {part}.",
                "Use another method.",
            )
    return found


def groups(model: nn.Module, modules: Sequence[str], plan: SharingPlan | None = None) -> list[list[str]]:
    """``modules`` put together as ``plan`` (default: the model's own) shares their weights; the others stay alone."""
    plan = plan or plan_of(model)
    if plan is None:
        raise OptionError(
            f"{type(model).__name__} carries no sharing plan, so it has no groups.",
            "Give a plan, or share='position'.",
        )
    weights = {job.modules for job in layout_of(model, plan).jobs if job.weight.kind != "other"}
    shared = [[name for name in names if name in modules] for names in sorted(weights)]
    taken = {name for names in shared for name in names}
    return [names for names in shared if names] + [[name] for name in modules if name not in taken]


def _of_layer(prefix: str, layer: Sequence[Weight]) -> Iterator[Place]:
    maps = [weight for weight in layer if weight.kind != "other" and weight.part in ("attention", "ffn")]
    width = _stream_width(maps)
    last: dict[tuple[str, str], str] = {}
    for weight in (weight for weight in maps if _sizes(weight)[1] == width):
        block = (weight.part, _block(weight, maps))
        if weight.part != "ffn" or block not in last or _sizes(weight)[0] != width:
            last[block] = weight.name
    for weight in maps:
        module = f"{prefix}.{weight.name.removesuffix('.weight')}"
        yield Place(module, weight.part, weight.name in last.values(), *_sizes(weight))


def _block(weight: Weight, maps: Sequence[Weight]) -> str:
    """Which of several attentions (self, cross) a map belongs to: the branch of the layer that holds it.

    Numbered branches are told apart one step further. A branch with one map is no attention of its own: all such maps
    are together, and so are the maps of the FFN.
    """
    if weight.part != "attention":
        return ""
    branches = Counter(_branch(other) for other in maps if other.part == "attention")
    return branch if branches[branch := _branch(weight)] > 1 else ""


def _branch(weight: Weight) -> str:
    return re.match(r"(?:.*?\b\d+\.)?[^.]+", weight.name).group()  # type: ignore[union-attr]


def _stream_width(maps: Sequence[Weight]) -> int:
    """The side that occurs most often: every map reads or writes the stream. The narrower one of two."""
    sides = Counter(side for weight in maps for side in weight.shape)
    return max(sides, key=lambda side: (sides[side], -side), default=0)


def _sizes(weight: Weight) -> tuple[int, int]:
    """(in, out) features."""
    first, second = weight.shape
    return (first, second) if weight.kind == "conv1d" else (second, first)


def _refuse_experts(model: nn.Module, parts: Sequence[str]) -> None:
    """In a mixture of experts no single map ends the FFN."""
    if "ffn" not in parts:
        return
    for stack in find_stacks(model):
        for layer in stack.layers:
            matrices = [weight for weight in layer if weight.part == "ffn"]
            alike = Counter(re.sub(r"\b\d+\b", "#", weight.name) for weight in matrices)
            if any(len(w.shape) > 2 and w.kind == "other" for w in matrices) or any(
                n > 1 for n in alike.values()
            ):
                raise ModelError(
                    f"the FFN of {stack.name!r} is a mixture of experts: no single linear map ends it.",
                    "Use method lora with parts attention.",
                )
