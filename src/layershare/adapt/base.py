"""The base under the adapters: recognised again, proved unchanged."""

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layershare.errors import ModelError
from layershare.result import write_atomic
from layershare.sharing import plan_of
from layershare.sharing.wrapped import bare
from layershare.stacks import find_stacks

__all__ = ["RECORD", "bare", "check", "fingerprint", "frozen_view", "own_memory", "read", "write"]

RECORD = "layershare_base.json"
"""The file beside adapter_config.json that says which base the adapter is for."""


def frozen_view(model: Any) -> Any:
    """``model`` with other modules and frozen parameters on the same memory: to add to, without touching ``model``."""
    views: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    view = copy.deepcopy(model, {id(buffer): buffer for buffer in model.buffers()} | views)
    view._layershare_view = True
    return view


def own_memory(view: Any) -> None:
    """Give the parameters of a frozen view memory of their own, before something writes to them. Ties hold."""
    if getattr(view, "_layershare_view", False):
        for parameter in view.parameters():
            parameter.data = parameter.data.clone()
        view._layershare_view = False


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one base from another: class, names and shapes, sharing plan, mean size of each layer weight."""
    plan = plan_of(model)
    shapes = [(name, *parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)]
    stacks = tuple(f"{stack.name}." for stack in find_stacks(model))
    weights = {
        name: float(f"{float(parameter.detach().abs().mean(dtype=torch.float32)):.6g}")
        for name, parameter in model.named_parameters()
        if name.startswith(stacks) and parameter.is_floating_point() and not parameter.is_meta
    }
    return {
        "model": type(model).__name__,
        "shapes": _hash(sorted(shapes)),
        "plan": _hash(plan.to_dict()) if plan else "",
        "weights": weights,
    }


def check(record: dict[str, Any], model: nn.Module, what: str) -> None:
    """Raise ModelError, saying what differs, if ``model`` is not the base that ``record`` was made from."""
    now = fingerprint(model)
    if record["model"] != now["model"]:
        reason = f"it belongs to a {record['model']}, this is a {now['model']}"
    elif record["plan"] != now["plan"]:
        before, after = ("a shared model" if one["plan"] else "an unshared model" for one in (record, now))
        reason = f"it was trained on {before}, this is {after}" + (
            " with another plan" if before == after else ""
        )
    elif record["shapes"] != now["shapes"]:
        reason = "this model has other parameters or other shapes"
    elif moved := _moved(record["weights"], now["weights"]):
        reason = f"the weights of this model differ, for example {moved}"
    else:
        return
    raise ModelError(
        f"{what}: the adapter is for another base: {reason}.",
        f"Load the model that it was trained on; to use it all the same, remove {RECORD}.",
    )


def read(folder: str | Path) -> dict[str, Any] | None:
    """The record in an adapter folder, or None if there is none."""
    file = Path(folder) / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def write(folder: str | Path, record: dict[str, Any]) -> None:
    """Put the record into an adapter folder."""
    write_atomic(Path(folder) / RECORD, json.dumps(record, indent=1) + "\n")


def _moved(before: dict[str, float], after: dict[str, float]) -> str:
    """A weight that is not the same; not to the last bit, as the base may have been loaded in another precision."""
    same = (name for name in before if name in after)
    return next((n for n in same if not math.isclose(before[n], after[n], rel_tol=2e-3, abs_tol=1e-8)), "")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
