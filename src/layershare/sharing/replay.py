"""Run a model again without computing again what can no longer change: layers whose maps are all settled.

Sequential calibration runs both models once for each step; with the settled layers replayed each layer is computed a
few times in all, not a few times for each layer behind it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layershare.sharing.gate import has_gate
from layershare.sharing.statistics import Batch, evaluating, to_device

Settled = Mapping[str, int]
"""By name of a stack: how many of its first layers are settled."""


class Replay:
    """What the last settled layer of each stack of one model said to each batch: O(one layer) of the calibration."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[tuple[str, int], tuple[int, Any]] = {}

    @contextmanager
    def run(self, number: int, settled: Settled) -> Iterator[None]:
        """Within it the model may be run on batch ``number``: settled layers say what they said when they were."""
        patched: list[tuple[nn.Module, Any]] = []
        hooks = []
        for stack, count in settled.items():
            layers = list(self.model.get_submodule(stack).children())
            known, said = self._known.get((stack, number), (0, None))
            for layer in layers[: min(known, count)]:  # the layers before the last one only pass it on
                patched.append((layer, layer.__dict__.get("forward")))
                layer.forward = _saying(said)
            if count > known:
                hooks.append(layers[count - 1].register_forward_hook(self._keep(stack, number, count)))
        try:
            yield
        finally:
            for layer, before in patched:
                if before is None:
                    del layer.forward
                else:  # another tool's, as accelerate's
                    layer.forward = before
            for hook in hooks:
                hook.remove()

    def _keep(self, stack: str, number: int, count: int) -> Callable:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            self._known[stack, number] = count, output

        return hook


def _saying(said: Any) -> Callable:
    return lambda *_, **__: said


@torch.no_grad()
def replayable(model: nn.Module, stacks: Sequence[str], batch: Batch) -> bool:
    """Whether the layers of ``stacks`` hand on all they say: found by trying, with half of each stack replayed.

    Not so where a layer reads the keys of an earlier one, or where gates stand around the layers.
    """
    batch = {
        k: value[:2] if isinstance(value, Tensor) and value.ndim else value for k, value in batch.items()
    }
    lists = {stack: list(model.get_submodule(stack).children()) for stack in stacks}
    if any(has_gate(layer) for layers in lists.values() for layer in layers):
        return False
    settled = {stack: len(layers) // 2 for stack, layers in lists.items() if len(layers) > 1}
    replay = Replay(model)
    said = []
    with evaluating(model):
        for _ in range(2):
            with replay.run(0, settled):
                try:
                    said.append(model(**to_device(model, batch))[0])
                except Exception:  # whatever it is that a layer behind misses
                    return False
    return torch.equal(*said)
