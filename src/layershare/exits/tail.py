"""What a classifier does behind its last layer: which token it reads, and through which modules. Found by watching.

The model runs once on a few random tokens. The modules that are called behind the last layer, in order, are tried with
each pooling; the pooling with which they give the model's own logits is the one that the model computes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from layershare.errors import LayershareError, ModelError
from layershare.stacks import Stack, find_stacks
from layershare.tasks.pooling import first, largest, last, mean

POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "first": first,
    "last": last,
    "mean": mean,
    "largest": largest,
}
SELECTING = ("first", "last")
"""Poolings that take one token as it is."""
Step = tuple[nn.Module, bool]
"""A module, and whether it picks a token itself, as BERT's pooler does: [B, T, d] -> [B, d]."""
ROWS, TOKENS = 3, 7
"""Of the probe. Two different primes: a tensor with three rows has one for each text."""


@dataclass(frozen=True)
class Tail:
    """How a classifier goes on behind its last layer.

    Attributes:
        stack: its layers.
        pooling: key of ``POOLINGS``.
        before: the model's own modules that see every token before pooling (a last norm); none where one is taken.
        behind: the model's own modules from the pooled states [B, d] to logits [B, classes]; none where replaying them
            did not give the model's logits.
        rows: position -> the paths of its layer's arguments that have one entry for each text of a batch.
    """

    stack: Stack
    pooling: str
    before: tuple[nn.Module, ...]
    behind: tuple[Step, ...]
    rows: tuple[frozenset[tuple], ...]

    def pooled(self, states: Tensor, mask: Tensor, pooling: str | None = None) -> Tensor:
        """[B, d] of the states [B, T, d] behind any layer; default: with the model's own pooling."""
        for module in self.before:
            states = module(states)
        return POOLINGS[pooling or self.pooling](states, mask)


def find_tail(model: Any) -> Tail:
    """Run ``model``, a classifier of whole texts, on random tokens, and see what follows its last layer.

    Raises ModelError for a model without exactly one stack of layers, or whose layers do not follow each other.
    """
    stack = _only_stack(model)
    probe = _probe(model)
    seen = _watch(model, stack, probe)
    mask = probe["attention_mask"]
    for pooling in POOLINGS:
        with _tolerant():
            found = Tail(stack, pooling, *_split(seen.calls, pooling), seen.rows)
            said = through(found.behind, found.pooled(seen.states, mask))
            if said.shape == seen.logits.shape and torch.allclose(said, seen.logits, rtol=1e-3, atol=1e-5):
                return found
    return Tail(stack, _pooling_by_gradient(seen), (), (), seen.rows)


def through(behind: Iterable[Step], pooled: Tensor) -> Tensor:
    """Pooled states [B, d] through modules; those that pick a token themselves see texts of one token."""
    for module, picks in behind:
        pooled = module(pooled[:, None]) if picks else module(pooled)
    return pooled


def states_of(output: Any) -> Tensor:
    """The hidden states in what a layer gives."""
    return output[0] if isinstance(output, tuple) else output


def with_states(output: Any, states: Tensor) -> Any:
    """What a layer gives, with other hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def tensors(args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[tuple, Tensor]]:
    """(path, tensor) of all tensors in the arguments of a call, also inside tuples and dicts."""

    def walk(path: tuple, value: Any) -> Iterator[tuple[tuple, Tensor]]:
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, tuple | list):
            for i, one in enumerate(value):
                yield from walk((*path, i), one)
        elif isinstance(value, dict):
            for key, one in value.items():
                yield from walk((*path, key), one)

    yield from walk((), args)
    yield from walk((), kwargs)


@dataclass
class _Seen:
    states: Tensor
    logits: Tensor
    calls: list[tuple[nn.Module, Tensor, Tensor]]
    """(module, its input, its output) behind the last layer; what is called by another one of them is left out."""
    rows: tuple[frozenset[tuple], ...]
    back: Callable[[], Tensor]
    """Which states the logits depend on: [B, T], the size of the gradient."""


def _only_stack(model: Any) -> Stack:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder: exits are for models with one stack of layers.")
    stacks = find_stacks(model)
    if len(stacks) > 1:
        names = ", ".join(stack.name for stack in stacks)
        raise ModelError(
            f"{name} has {len(stacks)} stacks ({names}): exits are for models with one stack of layers."
        )
    return stacks[0]


def _probe(model: Any) -> dict[str, Tensor]:
    """Random tokens; where there is padding, the texts are of different length, so that first, last and mean differ."""
    pad = getattr(model.config, "pad_token_id", None)
    draw = torch.Generator().manual_seed(0)
    words = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, words, (ROWS if pad is not None else 1, TOKENS), generator=draw)
    mask = torch.ones_like(ids)
    if pad is not None:
        ids[ids == pad] = (pad + 1) % words
        for row in range(1, ROWS):
            ids[row, TOKENS - row :], mask[row, TOKENS - row :] = pad, 0
    device = model.get_input_embeddings().weight.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _watch(model: Any, stack: Stack, probe: dict[str, Tensor]) -> _Seen:
    layers = [model.get_submodule(f"{stack.name}.{position}") for position in range(stack.length)]
    order: list[int] = []
    rows: list[frozenset[tuple]] = []
    last_states: list[Tensor] = []
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    open_calls: list[nn.Module] = []

    def enters(position: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            order.append(position)
            found = (path for path, one in tensors(args, kwargs) if one.ndim and len(one) == ROWS)
            rows.append(frozenset(found if len(probe["input_ids"]) == ROWS else ()))

        return hook

    def leaves(_: nn.Module, __: tuple, output: Any) -> Any:
        states = states_of(output).detach().requires_grad_()
        last_states.append(states)
        return with_states(output, states)

    def begins(module: nn.Module, _: tuple) -> None:
        if last_states:
            open_calls.append(module)

    def ends(module: nn.Module, args: tuple, output: Any) -> None:
        if open_calls and open_calls[-1] is module:
            open_calls.pop()
            if not open_calls and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.append((module, args[0], output))

    handles = [layer.register_forward_pre_hook(enters(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles += [
        layers[-1].register_forward_hook(leaves),
        hooks.register_module_forward_pre_hook(begins),
        hooks.register_module_forward_hook(ends),
    ]
    try:
        with torch.enable_grad():
            logits = model.eval()(**probe).logits
    finally:
        for handle in handles:
            handle.remove()
    name = type(model).__name__
    if order != list(range(len(layers))):
        raise ModelError(
            f"The layers of {name} are not called one after the other, each once: it gets no exits."
        )
    if last_states[0].shape[:2] != probe["input_ids"].shape:
        raise ModelError(f"The layers of {name} do not give states [texts, tokens, width]: it gets no exits.")

    def back() -> Tensor:
        (gradient,) = torch.autograd.grad(logits.sum(), last_states[0])
        return gradient.abs().amax(-1)

    # The last layer's own call ends behind its hook.
    behind = [call for call in calls if call[0] is not layers[-1]]
    return _Seen(last_states[0].detach(), logits.detach(), behind, tuple(rows), back)


def _split(
    calls: Sequence[tuple[nn.Module, Tensor, Tensor]], pooling: str
) -> tuple[tuple[nn.Module, ...], tuple[Step, ...]]:
    """The modules in front of the pooling and behind it. A token that is taken as it is may be taken at once."""
    place = 0
    if pooling not in SELECTING:
        place = next((i for i, (_, given, _) in enumerate(calls) if given.ndim == 2), len(calls))
    before = tuple(module for module, _, _ in calls[:place])
    return before, tuple((module, (given.ndim, made.ndim) == (3, 2)) for module, given, made in calls[place:])


def _pooling_by_gradient(seen: _Seen) -> str:
    """Which tokens the logits depend on: only the first, only the last, or more (their mean is taken then)."""
    reads = seen.back() > 0
    if not reads[:, 1:].any():
        return "first"
    return "last" if (reads.sum(1) == 1).all() else "mean"


@contextmanager
def _tolerant() -> Iterator[None]:
    """Modules that are replayed with what they were not made for may raise anything: that is an answer, too."""
    try:
        with torch.no_grad():
            yield
    except LayershareError:
        raise
    except Exception:  # noqa: S110
        pass
