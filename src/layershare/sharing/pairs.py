"""One map in two models of one shape: what it sees in the student, and how far its output is from the original's."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layershare.sharing.padding import padding_of, rows_of
from layershare.sharing.statistics import (
    Batch,
    Enough,
    evaluating,
    output_layer,
    refuse_unseen,
    to_device,
)

# How exactly a sum must follow what is added to one of its terms; bf16 rounds it to about 1 %.
EXACT = 0.05


Again = Callable[[int], tuple[AbstractContextManager, AbstractContextManager]]
"""Number of a batch -> within what the original, and the student, are run on it."""


class Paired(NamedTuple):
    """Moments over all unmasked tokens, in float32: y is what the map sees in the student, and ``gap`` what its output
    there lacks. Where the output is added to the residual stream the gap is that of the sum, so the map also makes up
    for errors that reached the stream before it."""

    gram: Tensor
    """E[y y^T], (in, in)."""
    mean: Tensor
    """E[y], (in)."""
    shift: Tensor
    """E[gap y^T], (out, in); 0 where the two models give a map different tokens."""
    lift: Tensor
    """E[gap], (out)."""


@torch.no_grad()
def collect_pairs(
    original: nn.Module, student: nn.Module, modules: Mapping[str, str], batches: Iterable[Batch],
    sums: Mapping[str, tuple[str, str]] | None = None, again: Again | None = None,
    needed: Collection[str] | None = None,
) -> dict[str, Paired]:  # fmt: skip
    """What ``modules`` see and miss in two models that get the same batches. Keys: names in the student, values: in the
    original. ``sums``: for modules of the student, which module reads the sum that they add to, there and in the
    original (:func:`readers_of_sums`). ``again``: what need not be computed again, in the original and the student.
    Neither model runs further than it must. A module that sees no token is left out; DataError if it is ``needed``, as
    all are by default.
    """
    readers = {name: sums[name] for name in modules if sums and name in sums}
    found: dict[str, Paired] = {}
    seen: dict[str, int] = {}
    runs = 0
    with evaluating(original), evaluating(student):
        for number, batch in enumerate(batches if modules else ()):
            runs += 1
            there, here = (nullcontext(), nullcontext()) if again is None else again(number)
            with there:
                theirs = _run(
                    original, list(modules.values()), [reader for _, reader in readers.values()], batch
                )
            with here:
                ours = _run(student, list(modules), [reader for reader, _ in readers.values()], batch)
            for name, old in modules.items():
                if (name, 0) not in ours or (old, 1) not in theirs:
                    continue
                y = ours[name, 0]
                own, its = readers.get(name, (name, old))
                side = 0 if name in readers else 1
                now, aim = ours[own, side], theirs[its, side]
                # Experts see other tokens in the other model: no pairs, so nothing to make up for.
                gap = aim - now if aim.shape == now.shape else torch.zeros_like(ours[name, 1])
                one = Paired(y.T @ y, y.sum(0), gap.T @ y, gap.sum(0))
                found[name] = Paired(*map(torch.add, found[name], one)) if name in found else one
                seen[name] = seen.get(name, 0) + len(y)
    refuse_unseen([name for name in modules if needed is None or name in needed], seen, runs)
    return {name: Paired(*(total / seen[name] for total in totals)) for name, totals in found.items()}


@torch.no_grad()
def readers_of_sums(model: nn.Module, modules: Sequence[str], batch: Batch) -> dict[str, str]:
    """For each of ``modules`` whose output is added to a residual stream, the module that reads the sum first.

    Found by trying, not by names: something is added to the output, and the first tensor that any later module reads
    and that moves by exactly this is the sum. Modules without one are left out. A stream is as wide as what a block
    around the module reads; it is looked for up to the second layer behind, and not in the output layer.
    """
    batch = {
        k: value[:1] if isinstance(value, Tensor) and value.ndim else value for k, value in batch.items()
    }
    outputs: dict[str, Tensor] = {}
    found: dict[str, str] = {}
    before: list[tuple[str, Tensor]] = []

    def note(name: str, given: Tensor) -> None:
        before.append((name, given))

    with evaluating(model):
        _reading(model, batch, note, outputs, {})
        sizes: dict[str, set[tuple[int, int]]] = {}
        for name, given in before:
            sizes.setdefault(name, set()).add(_size(given))
        for name in modules:
            if name not in outputs:
                continue
            out, end = outputs[name], _end(model, name, before)
            if not any(_size(out) in sizes.get(block, ()) for block in _around(name)):
                continue
            noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
            noise = noise * out.float().square().mean().sqrt().clamp_min(1e-6).to(out)
            calls = iter(before[:end])

            def compare(
                reader: str, new: Tensor, name: str = name, noise: Tensor = noise, calls: Any = calls
            ) -> None:
                was, old = next(calls, ("", new))
                if was != reader:  # the end, or experts whom the noise has called
                    raise Enough
                if _size(old) == _size(new) == _size(noise):
                    then, now, more, own = (
                        one.float().reshape(-1, one.shape[-1]) for one in (old, new, noise, outputs[name])
                    )
                    rest = (now - then - more).square().mean()
                    if not torch.equal(then, own) and rest.sqrt() < EXACT * more.square().mean().sqrt():
                        found[name] = reader
                        raise Enough

            _reading(model, batch, compare, {}, {name: noise})
    return found


def _size(given: Tensor) -> tuple[int, int]:
    """How many numbers, and how many for a token; the tokens of all texts may stand in one row."""
    return given.numel(), given.shape[-1] if given.ndim else 1


def _around(name: str) -> Iterable[str]:
    """The modules that have ``name`` in them, the whole model left out."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _end(model: nn.Module, name: str, calls: Sequence[tuple[str, Tensor]]) -> int:
    """Which of ``calls`` is beyond the layer that follows the one with ``name`` in it."""
    output = output_layer(model)
    beyond = {other for other, module in model.named_modules() if module is output}
    for block in _around(name):
        if isinstance(model.get_submodule(block), nn.ModuleList):
            beyond.add(f"{block}.{int(name[len(block) + 1 :].partition('.')[0]) + 2}")
            break
    own = next((number for number, (caller, _) in enumerate(calls) if caller == name), 0)
    return next((n for n, (caller, _) in enumerate(calls) if n > own and caller in beyond), len(calls))


def _reading(
    model: nn.Module, batch: Batch, see: Callable[[str, Tensor], None], outputs: dict[str, Tensor],
    noise: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Let ``see`` see what each module reads, in the order of the calls, until it has ``Enough``; ``noise`` is added
    to outputs. Fills ``outputs``."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def before(_: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                if (given := _first(args, kwargs)) is not None:
                    see(name, given)

            def after(_: nn.Module, __: tuple, output: Any, name: str = name) -> Any:
                if not isinstance(output, Tensor):
                    return None
                outputs[name] = output + noise[name] if name in noise else output
                return outputs[name]

            if name:
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        hooks.enter_context(suppress(Enough))
        model(**to_device(model, batch))


def _first(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)), None)


def _run(
    model: nn.Module, modules: Sequence[str], readers: Sequence[str], batch: Batch
) -> dict[tuple[str, int], Tensor]:
    """The unmasked rows that go in (name, 0) and come out (name, 1) of ``modules``, and that go into ``readers``."""
    batch = to_device(model, batch)
    mask = padding_of(model, batch)
    rows: dict[tuple[str, int], Tensor] = {}
    left = {*modules, *readers}

    def keep(key: tuple[str, int], given: Tensor) -> None:
        rows.setdefault(key, rows_of(given, mask).float())

    def done(name: str) -> None:
        left.discard(name)
        if not left:
            raise Enough

    with ExitStack() as hooks:
        for name in {*modules, *readers}:

            def before(_: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                if (given := _first(args, kwargs)) is not None:
                    keep((name, 0), given)
                if name not in modules:
                    done(name)

            def after(_: nn.Module, __: tuple, output: Tensor, name: str = name) -> None:
                keep((name, 1), output)
                done(name)

            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if name in modules:
                hooks.callback(module.register_forward_hook(after).remove)
        hooks.enter_context(suppress(Enough))
        model(**batch)
    return rows
