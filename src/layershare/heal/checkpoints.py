"""The checkpoints of a run: which one to go on from, and whether they belong to this run at all."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from layershare.errors import TrainingError
from layershare.heal.callbacks import Ema


def resume_point(
    folder: Path,
    model: nn.Module,
    inputs: str,
    config: Mapping[str, Any],
    resume: bool,
    made_of: Mapping[str, str] | None = None,
) -> Path | None:
    """The checkpoint in ``folder`` to go on from, or None for a fresh start.

    Removes half-written checkpoints, and all of them when ``resume`` is False. ``run.json`` records what the
    run is made of; checkpoints of another config, other ``inputs`` (a hash), another model, or another of what
    ``made_of`` names (name -> hash: labels, teacher) raise TrainingError, because mixing runs would give a
    model that no settings describe.
    """
    identity = {
        "config": dict(config), "data": inputs, "model": _weights_summary(model), "made of": dict(made_of or {}),
    }  # fmt: skip
    record = folder / "run.json"
    steps = sorted(
        (path for path in folder.glob("checkpoint-*") if _step(path).isdigit()),
        key=lambda path: int(_step(path)),
    )
    while steps and not (resume and _complete(steps[-1], ema=bool(config.get("ema_decay")))):
        shutil.rmtree(steps.pop())
    if steps:
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = {}
        if changed := _differences(stored, identity):
            raise TrainingError(
                f"The checkpoints in {folder} are of another run: {'; '.join(changed)}.",
                "Use the same settings, another folder, or begin anew (--anew, in Python resume=False).",
            )
        if not _covers(steps[-1], model):
            raise TrainingError(f"{steps[-1]} lacks weights of the model.", "Remove it, or begin anew.")
        return steps[-1]
    folder.mkdir(parents=True, exist_ok=True)
    part = record.with_suffix(".part")
    part.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    part.replace(record)
    return None


def _step(checkpoint: Path) -> str:
    return checkpoint.name.partition("-")[2]


def _complete(checkpoint: Path, ema: bool) -> bool:
    """Whether a checkpoint was written to its end: Trainer writes the state last, then comes the average."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    needed = ["optimizer.pt", "scheduler.pt", *([Ema.FILE] if ema else [])]
    return all((checkpoint / name).is_file() for name in needed)


def _covers(checkpoint: Path, model: nn.Module) -> bool:
    """Whether every parameter is in the checkpoint under one of its names; Trainer would only log a gap."""
    names: set[str] = set()
    for path in checkpoint.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    found = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    return found == {id(p) for p in model.parameters()}


def _differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    before, after = stored.get("config", {}), now["config"]
    found = [
        f"{key} was {before.get(key)!r}, now {after[key]!r}" for key in after if before.get(key) != after[key]
    ]
    if stored.get("data") != now["data"]:
        found.append("the inputs differ")
    was, made_of = stored.get("made of", {}), now["made of"]
    found += [
        f"the {name} differ{'' if name.endswith('s') else 's'}"
        for name in sorted(was | made_of)
        if was.get(name) != made_of.get(name)
    ]
    old, new = stored.get("model", {}), now["model"]
    # Not to the last bit: the same model may have been made with another number of threads.
    if old.keys() != new.keys() or any(
        not math.isclose(old[k], new[k], rel_tol=1e-3, abs_tol=1e-9) for k in new
    ):
        found.append("the model to train differs")
    return found


def _weights_summary(model: nn.Module) -> dict[str, float]:
    return {name: float(p.detach().float().abs().mean()) for name, p in model.named_parameters()}


def digest(rows: Iterable[Any]) -> str:
    """A hash of a column: token ids, labels, or images and sounds, which go by the hash of what is in them."""
    found = hashlib.sha256()
    for row in rows:
        found.update((row["sha256"] if isinstance(row, dict) else repr(row)).encode())
    return found.hexdigest()


def digest_rows(dataset: Any, leave_out: Iterable[str] = ("labels",)) -> str:
    """A hash of the columns of a dataset, save those left out."""
    names = sorted(set(getattr(dataset, "column_names", ["input_ids"])) - set(leave_out))
    return digest([name, digest(dataset[name])] for name in names)
