"""From the states of the tokens to one embedding: as the folder of a Sentence Transformer says, else by their mean."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layershare.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

COMPUTED = {"Transformer", "Pooling", "Normalize", ""}
"""The modules of a Sentence Transformer that are known here; normalising is done to every embedding."""


def mean(states: "Tensor", mask: "Tensor") -> "Tensor":
    """The mean of the real tokens."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def first(states: "Tensor", mask: "Tensor") -> "Tensor":  # noqa: ARG001 - one signature for all
    """The first token, [CLS] in BERT."""
    return states[:, 0]


def last(states: "Tensor", mask: "Tensor") -> "Tensor":
    """The last real token."""
    import torch

    places = torch.arange(mask.shape[1], device=mask.device) * mask
    return states[torch.arange(states.shape[0], device=states.device), places.argmax(1)]


def largest(states: "Tensor", mask: "Tensor") -> "Tensor":
    """The largest value of the real tokens in each dimension."""
    import torch

    return states.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(states.dtype).min).amax(1)


LOOKED_AT = ("", "modules.json", "1_Pooling/config.json")
"""Where these have not changed, a folder pools as it did."""

Pooling = Callable[["Tensor", "Tensor"], "Tensor"]
"""(states [B, T, d], mask [B, T]) -> [B, d]"""

POOLINGS: dict[str, Pooling] = {
    "mean": mean,
    "mean_tokens": mean,
    "cls": first,
    "cls_token": first,
    "lasttoken": last,
    "max": largest,
    "max_tokens": largest,
}
"""By the names that Sentence Transformers have for them, before and since version 5."""


def pooling_of(config: Any) -> Pooling:
    """The pooling of the model with this config, as the folder or hub name that it was loaded from says.

    Raises ModelError for a pooling, or a module behind it, that is not computed here, and for a folder that is gone.
    """
    source = getattr(config, "_name_or_path", "")
    if not source:
        return mean
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _of_the_folder(source, *(_changed(folder / name) for name in LOOKED_AT))
    if folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise ModelError(
            f"{source}, from which the model was loaded, is gone, and with it how its tokens are pooled.",
            "Put the folder back, or load the model from where it is now.",
        )
    return _of_the_hub(source)


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache
def _of_the_folder(source: str, *changed: int) -> Pooling:  # noqa: ARG001 - when it changes, it is read again
    folder = Path(source).expanduser()
    return _read(source, lambda name: _local(folder / name))


@lru_cache
def _of_the_hub(source: str) -> Pooling:
    from transformers.utils import cached_file

    def load(name: str) -> Any:
        quiet = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        file = cached_file(source, name, _raise_exceptions_for_gated_repo=False, **quiet)
        return None if file is None else _local(Path(file))

    return _read(source, load)


def _local(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _read(source: str, load: Callable[[str], Any]) -> Pooling:
    modules = load("modules.json") or []
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if foreign := next((kind for kind in kinds if kind not in COMPUTED), None):
        raise ModelError(
            f"{source} is a Sentence Transformer with a module {foreign}, which layershare does not compute.",
            f"It knows {', '.join(sorted(filter(None, COMPUTED)))}.",
        )
    path = next((module["path"] for module in modules if module.get("path", "").endswith("Pooling")), None)
    settings = load(f"{path}/config.json") if path else None
    if not settings:
        return mean
    newer = settings.get("pooling_mode")
    modes = [newer] if isinstance(newer, str) else list(newer or ())
    named = [key.removeprefix("pooling_mode_") for key, on in settings.items() if on is True]
    modes += [mode for mode in named if f"pooling_mode_{mode}" in settings]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ModelError(
            f"{source} pools its tokens by {' and '.join(modes) or 'nothing'}, which layershare does not compute.",
            f"It knows one of {', '.join(POOLINGS)}.",
        )
    return POOLINGS[modes[0]]
