"""The local phase: every layer reads what the teacher's layers hand on, so each learns by itself, all at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from layershare.errors import OptionError
from layershare.heal.layers import LayerMap, depths, parts_of, widths


def layers_of(model: Any) -> list[list[nn.Module]]:
    """The layers of ``model`` in order, a list for each of its parts: of an encoder-decoder two."""
    found = []
    for part, depth in zip(parts_of(model), depths(model), strict=True):
        lists = (m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        found.append(list(next(lists, [])))
    return found


def check_local(student: Any, teacher: Any, pairs: LayerMap) -> None:
    """Raise OptionError where no layer can read what the teacher's say."""
    if not pairs:
        raise OptionError(
            "The local phase compares hidden states.", "Set weights.hidden above 0, or local to 0."
        )
    ours, theirs = ("/".join(map(str, widths(model.config))) for model in (student, teacher))
    if ours != theirs:
        raise OptionError(
            f"Layers of width {ours} cannot read hidden states of width {theirs}.",
            "Set local to 0.",
        )
    if [len(part) for part in layers_of(student)] != list(depths(student)):
        raise OptionError(f"The layers of {type(student).__name__} were not found.", "Set local to 0.")


@contextmanager
def by_itself(
    layers: Sequence[Sequence[nn.Module]], pairs: LayerMap, hidden: Mapping[int, Tensor]
) -> Iterator[None]:
    """Within it, a layer whose predecessor is compared with a teacher's reads ``hidden`` of that one [B, T, d] instead
    of its output: no gradient goes further back, and no error further on. ``pairs``: as in :mod:`.layers`;
    ``layers``: of the student, by part."""

    def reads(given: Tensor) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (given.to(args[0].dtype), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": given.to(kwargs["hidden_states"].dtype)}

        return hook

    following: dict[int, nn.Module] = {}
    start = 0
    for part in layers:
        following |= dict(enumerate(part[1:], start))
        start += len(part)
    with ExitStack() as hooks:
        for ours, theirs in pairs:
            if ours in following:
                hook = reads(hidden[theirs])
                hooks.callback(following[ours].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
