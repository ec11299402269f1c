"""Find the stacks of repeated layers in any model, by structure and never by model name.

A stack is a ``ModuleList`` (or ``Sequential``) in which at least two children are layers of equal class and equal
parameter shapes. A :class:`Stack` holds names and shapes only: plans are resolved and priced on it, without weights.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from layershare.errors import ModelError
from layershare.linear import FACTORS, GATE, FactoredLinear, kind_of

PARTS = ("attention", "ffn", "norm", "other")
# Words that module names and classes use for the two halves of a Transformer layer, tried on the path below the layer.
_ATTENTION = re.compile(r"attention|attn|(^|\.)(q|k|v|o)_proj\b", re.IGNORECASE)
_MIXER = re.compile(r"mamba|mixer|ssm|rnn|recurrent|conv|rglru|delta", re.IGNORECASE)


@dataclass(frozen=True)
class Weight:
    """One parameter of a layer: its name inside the layer, shape, part, kind of its module, element size in bytes."""

    name: str
    shape: tuple[int, ...]
    part: str
    kind: str
    """``linear`` (out, in), ``conv1d`` (in, out; GPT-2's own linear layer) or ``other``."""
    itemsize: int

    @property
    def factorable(self) -> bool:
        """Whether it is the matrix of a plain linear map."""
        return self.kind != "other" and len(self.shape) == 2

    @property
    def size(self) -> int:
        size = 1
        for side in self.shape:
            size *= side
        return size


@dataclass(frozen=True)
class Stack:
    """Repeated layers of a model. ``layers[i]`` lists the parameters of the layer at position i."""

    name: str
    classes: tuple[str, ...]
    layers: tuple[tuple[Weight, ...], ...]
    tied: bool = False
    """True if the layers of the given model already share parameters."""

    @property
    def length(self) -> int:
        return len(self.layers)

    @property
    def layer_class(self) -> str:
        return " | ".join(sorted(set(self.classes)))

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Effective parameter count by part (``attention``, ``ffn``, ``norm``, ``other``), over all positions."""
        counts = Counter(dict.fromkeys(PARTS, 0))
        for layer in self.layers:
            for weight in layer:
                counts[weight.part] += weight.size
        return dict(counts)

    @property
    def size(self) -> int:
        """Effective parameters of all positions."""
        return sum(self.parameters.values())

    @cached_property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """The positions by kind of layer: those of a kind have most of their matrices in common, by name and shape.

        One kind in most models; layers of attention and of Mamba, or with and without experts, are of two.
        """
        found: dict[tuple[Weight, ...], list[int]] = {}
        for position, layer in enumerate(self.layers):
            matrices = tuple(weight for weight in layer if weight.part != "norm")
            like = next((kind for kind in found if _alike(kind, matrices)), matrices)
            found.setdefault(like, []).append(position)
        return tuple(map(tuple, found.values()))

    def __str__(self) -> str:
        share = ", ".join(f"{part} {count:,}" for part, count in self.parameters.items() if count)
        state = ", already shared" if self.tied else ""
        return f"{self.name}: {self.length} x {self.layer_class}, {self.size:,} parameters ({share}){state}"


def _alike(one: tuple[Weight, ...], other: tuple[Weight, ...]) -> bool:
    """Whether more than half of all they have is common to both."""
    common, every = set(one) & set(other), set(one) | set(other)
    return one == other or 2 * sum(weight.size for weight in common) > sum(weight.size for weight in every)


def find_stacks(model: nn.Module, known: Iterable[str] = ()) -> tuple[Stack, ...]:
    """All stacks of ``model``, outermost first, in the order of its modules. Works on the meta device.

    ``known`` names lists that are stacks even if no two of their layers are alike, as after dropping most of them.

    Raises :class:`~layershare.errors.ModelError` if there is none, saying so when the model stores one layer and
    applies it many times (ALBERT).
    """
    stacks, inside = [], None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if _is_stack(module) or (_is_list(module) and any(same_stack(name, one) for one in known)):
            stacks.append(_describe(name, module))
            inside = f"{name}."
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no repeated layers to share{_why_none(model)}.")
    return tuple(stacks)


def same_stack(name: str, other: str) -> bool:
    """Whether two names mean one stack: a base model and the same model under a head differ by a prefix."""
    return name == other or name.endswith(f".{other}") or other.endswith(f".{name}")


def _is_stack(module: nn.Module) -> bool:
    if not _is_list(module):
        return False
    alike = Counter(_signature(layer) for layer in module._modules.values() if layer is not None)
    return any(times > 1 for signature, times in alike.items() if signature)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0


def _signature(layer: nn.Module) -> tuple | None:
    """Class and parameter shapes, or None for what is no layer: fewer than two weight matrices, or nothing inside."""
    weights = _weights(layer)
    if sum(len(weight.shape) >= 2 for weight in weights) < 2 or not any(True for _ in layer.children()):
        return None
    return (type(layer), tuple((weight.name, weight.shape) for weight in weights))


def _describe(name: str, stack: nn.Module) -> Stack:
    layers = list(stack._modules.values())
    owners = [{id(parameter) for parameter in layer.parameters()} for layer in layers if layer is not None]
    tied = len(set().union(*owners)) < sum(map(len, owners))
    classes = tuple(type(layer).__name__ for layer in layers)
    return Stack(name, classes, tuple(tuple(_weights(layer)) for layer in layers), tied)


def _weights(layer: nn.Module | None) -> list[Weight]:
    """What the layer computes with: a factored map counts as the one weight that it stands for, gates do not count."""
    found: list[Weight] = []
    if layer is None:
        return found
    for path, module in layer.named_modules():
        for leaf, shape, itemsize in _tensors(module):
            name = f"{path}.{leaf}" if path else leaf
            kind = kind_of(module) if leaf == "weight" else "other"
            found.append(Weight(name, shape, _part(layer, path, shape), kind, itemsize))
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...], int]]:
    if isinstance(module, FactoredLinear):
        shape = (module.out_features, module.in_features)
        yield "weight", shape[::-1] if module.transposed else shape, module.factor.element_size()
    for leaf, parameter in module.named_parameters(recurse=False):
        if leaf != GATE and not (isinstance(module, FactoredLinear) and leaf in FACTORS):
            yield leaf, tuple(parameter.shape), parameter.element_size()


def _part(layer: nn.Module, path: str, shape: tuple[int, ...]) -> str:
    """Vectors are ``norm`` (with biases and scales); matrices go by the modules they stand in."""
    if sum(side > 1 for side in shape) < 2:
        return "norm"
    words = [path]
    module = layer
    for step in path.split(".") if path else ():
        module = getattr(module, step)
        words.append(type(module).__name__)
    if any(_ATTENTION.search(word) for word in words):
        return "attention"
    return "other" if any(_MIXER.search(word) for word in words if word != "Conv1D") else "ffn"


def _why_none(model: nn.Module) -> str:
    positions = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    single = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == 1 and _signature(m[0])
    ]
    if single and isinstance(positions, int) and positions > 1:
        return f": it is already shared, {single[0]} stores one layer and applies it {positions} times"
    return ""
