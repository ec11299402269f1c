"""The queries, keys and values of a layer, caught as they are computed: under any attention implementation."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from layershare.errors import ModelError

QKV = ("q", "k", "v")

# What the maps of queries, keys and values are called, and maps that give all three end to end.
NAMES = {
    "q": {"q", "query", "q_proj", "q_lin", "wq", "query_proj", "to_q"},
    "k": {"k", "key", "k_proj", "k_lin", "wk", "key_proj", "to_k"},
    "v": {"v", "value", "v_proj", "v_lin", "wv", "value_proj", "to_v"},
}
FUSED = {"c_attn", "Wqkv"}


def attention_maps(model: Any, layer: int | None) -> dict[str, nn.Module]:
    """The modules that compute ``q``, ``k`` and ``v`` of a layer, or ``qkv`` where one does; {} for None.

    Positions count from 0; of several attentions in a layer it is the first. ModelError where the maps cannot be told.
    """
    if layer is None:
        return {}
    depth = model.config.num_hidden_layers
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == depth and (found := _maps(stack[layer])):
            return found
    raise ModelError(
        f"No maps of queries, keys and values were found in {type(model).__name__}.",
        "Set weights.relation to 0; weights.hidden serves any model.",
    )


@contextmanager
def capture(maps: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds ``q``, ``k`` and ``v`` [B, T, d] after a forward pass within."""
    caught: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            caught.update(zip(QKV, output.chunk(3, -1), strict=True) if name == "qkv" else [(name, output)])

        return hook

    with ExitStack() as stack:
        for name, module in maps.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        yield caught


def _maps(layer: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        leaf = path.rpartition(".")[2]
        if leaf in FUSED:
            return {"qkv": module}
        for name in QKV:
            if leaf in NAMES[name]:
                found.setdefault(name, module)
    return found if len(found) == 3 else {}
