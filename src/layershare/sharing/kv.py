"""Keys and values of one position for a whole group: cross-layer attention (Brandon et al., 2024, 2405.12981).

The first position of the group computes keys and values from what it reads; the maps of the others give its outputs of
the same forward pass instead of their own. So nothing depends on whether there is a cache: training, a pass without
cache and generation compute the same. What the maps hold is tied, hence stored once, and the others' products are
never computed.

The others' keys and values are then those that the first one has cached. A ``DynamicCache`` (what ``generate`` uses)
keeps them once: its layers of the others become :class:`ReadingLayer`. Sliding windows and static caches keep copies.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from layershare.errors import ModelError

# As modules of attention are called; the norm of the keys belongs to them, the rotation is equal at all positions.
_MAP = re.compile(r"(^|\.)(k|v|key|value)(_?(proj|lin|linear))?\.(weight|bias)$")
_NORM = re.compile(r"(^|\.)(k|v|key|value)_?(norm|layernorm|layer_norm|ln)\.\w+$")
# See gate.py for why hooks have numbers of their own.
_KEY = -3


def is_map(name: str) -> bool:
    """Whether a parameter, by its name inside the layer, is of a map to keys or values."""
    return _MAP.search(name) is not None


def belongs(name: str) -> bool:
    """Whether keys or values depend on it: it is of such a map, or of their norm."""
    return is_map(name) or _NORM.search(name) is not None


class Lent:
    """What a map gave in the forward pass that runs. Copies and pickles are empty: they are of other passes."""

    def __init__(self) -> None:
        self.output: Tensor | None = None

    def __reduce__(self) -> tuple:
        return Lent, ()


class ReadingLayer(DynamicLayer):
    """A position of a cache that keeps nothing: its keys and values are those of ``owner``.

    The first ones are compared. A position that rotates its keys otherwise becomes an ordinary one that keeps its own.
    """

    def __init__(self, owner: DynamicLayer, *, known: bool = False) -> None:
        super().__init__()
        self.owner, self.known = owner, known

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.owner.keys, self.owner.values
        assert keys is not None
        assert values is not None
        if not self.known:
            if not (torch.equal(keys, key_states) and torch.equal(values, value_states)):
                self.__class__ = DynamicLayer  # type: ignore[assignment]
                del self.owner
                return self.update(key_states, value_states)
            self.known = True
        return keys, values

    def get_seq_length(self) -> int:
        return self.owner.get_seq_length()

    def reset(self) -> None:
        """The owner's business, as is all that changes a cache."""

    def crop(self, tokens_to_remove: int) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None: ...

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...


def install_kv(model: nn.Module, maps: Iterable[Sequence[str]]) -> None:
    """``maps``: names of the maps of one kind, the first one's first. Works on the meta device."""
    for names in maps:
        lent = Lent()
        for i, name in enumerate(names):
            module: Any = model.get_submodule(name)
            module._lent = lent
            module._forward_hooks[_KEY] = _read if i else _lend
            module._forward_hooks.move_to_end(_KEY, last=False)
            if i:
                module._forward_pre_hooks[_KEY] = _nothing


def install_readers(model: nn.Module, attentions: Iterable[Sequence[str]]) -> None:
    """``attentions``: names of a group's attention modules. The cache keeps what the first of them put there."""
    for owner, *others in attentions:
        place = getattr(model.get_submodule(owner), "layer_idx", None)
        for name in others if isinstance(place, int) else ():
            module: Any = model.get_submodule(name)
            module._reads_from = place
            module._forward_pre_hooks[_KEY] = _share_cache
            module._forward_pre_hooks_with_kwargs[_KEY] = True


def owners(cache: Any) -> dict[int, int]:
    """Of each position of a cache that reads another one's keys and values, that one."""
    layers = getattr(cache, "layers", ())
    places = {id(layer): i for i, layer in enumerate(layers)}
    return {i: places[id(one.owner)] for i, one in enumerate(layers) if isinstance(one, ReadingLayer)}


def lost_kv(model: nn.Module, maps: Iterable[Sequence[str]]) -> list[str]:
    """Names of maps that no longer give the first position's output."""
    lost = []
    for owner, *others in maps:
        lent = getattr(model.get_submodule(owner), "_lent", None)
        hooked = model.get_submodule(owner)._forward_hooks.get(_KEY) is _lend
        lost += [] if hooked and lent is not None else [owner]
        for name in others:
            module = model.get_submodule(name)
            reads = module._forward_hooks.get(_KEY) is _read and getattr(module, "_lent", None) is lent
            lost += [] if reads else [name]
    return lost


def _lend(module: nn.Module, _: tuple, output: Tensor) -> None:
    module._lent.output = output  # type: ignore[union-attr]


def _nothing(_: nn.Module, args: tuple) -> tuple:
    """No row of the input: the product would not be used."""
    return (args[0][..., :0, :], *args[1:])


def _read(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
    found = module._lent.output  # type: ignore[union-attr]
    wanted = output.shape[:-2], output.shape[-1]
    if not isinstance(found, Tensor) or (found.shape[:-2], found.shape[-1]) != wanted:
        raise ModelError(
            "keys and values are read from another position, which did not run before.",
            "A model with kv = true runs whole: its layers cannot be called alone.",
        )
    if torch.is_grad_enabled() and output.requires_grad and not found.requires_grad:
        raise ModelError(
            "gradients of keys and values that several positions read would be lost.",
            "Use gradient checkpointing with use_reentrant=False.",
        )
    return found


def _share_cache(module: Any, _: tuple, kwargs: dict[str, Any]) -> None:
    """Let a cache that is still empty at this position read from the first one's."""
    cache = kwargs.get("past_key_values")
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    place, here = module._reads_from, module.layer_idx
    if type(cache) is not DynamicCache or not isinstance(here, int) or cache.offloading:
        return
    layers: list[Any] = cache.layers
    owner = layers[place] if place < len(layers) else None
    empty = here == len(layers) or (
        here < len(layers) and type(layers[here]) is DynamicLayer and not layers[here].is_initialized
    )
    if type(owner) is DynamicLayer and owner.is_initialized and empty:
        layers[here : here + 1] = [ReadingLayer(owner)]
