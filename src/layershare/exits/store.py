"""Exits beside a model: ``exits.json`` and ``exits.safetensors``. The folder stays an ordinary model folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from layershare.errors import OptionError, StoreError
from layershare.exits.head import new_heads
from layershare.exits.model import EarlyExit
from layershare.exits.tail import POOLINGS, find_tail
from layershare.result import write_atomic
from layershare.store.open import load_model, local_folder

SETTINGS, WEIGHTS, FORMAT = "exits.json", "exits.safetensors", 1
AUTO_CLASS = "AutoModelForSequenceClassification"


def save(folder: Path, heads: nn.ModuleDict, threshold: float, said: Mapping[str, Any]) -> None:
    """Write both files. ``said``: what else is worth knowing."""
    save_file({name: value.contiguous() for name, value in heads.state_dict().items()}, folder / WEIGHTS)
    poolings = {position: head.pooling for position, head in heads.items()}
    settings = {"format": FORMAT, "exits": poolings, "threshold": threshold, **said}
    write_atomic(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def load(folder: str | Path, *, threshold: float | None = None) -> EarlyExit:
    """The model of a folder that ``layershare exits`` wrote, with its exits.

    threshold: the least probability of the likeliest class to leave with; default: the one that was chosen. Less is
    faster, above 1 no text leaves early.

    Raises StoreError for a folder without exits, or with exits of another model; OptionError; ModelError.
    """
    if threshold is not None and not threshold > 0:
        raise OptionError(
            f"The threshold is {threshold:g}.", "It is a probability above 0; above 1: no exit."
        )
    source = local_folder(folder)
    settings = _settings(source, folder)
    model = load_model(source, AUTO_CLASS)
    tail = find_tail(model)
    try:
        poolings = {int(position): pooling for position, pooling in settings["exits"].items()}
        if not all(pooling in POOLINGS for pooling in poolings.values()):
            raise ValueError("an unknown pooling")
        heads = new_heads(model, tail, poolings)
        heads.load_state_dict(load_file(source / WEIGHTS))
        chosen = float(settings["threshold"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StoreError(
            f"{folder}: its exits do not fit the model, or are broken ({reason}).", "Make them again."
        ) from None
    return EarlyExit(model, heads, chosen if threshold is None else threshold, tail)


def _settings(source: Path, folder: str | Path) -> dict[str, Any]:
    try:
        found = json.loads((source / SETTINGS).read_text(encoding="utf-8"))
        newer = found["format"] > FORMAT
    except FileNotFoundError:
        raise StoreError(f"{folder} has no exits.", "Make them: layershare exits MODEL -o OUT") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{source / SETTINGS} is broken ({error}).", "Make the exits again.") from None
    if newer:
        raise StoreError(f"{folder}: its exits are of a newer format.", "Update layershare.")
    return found
