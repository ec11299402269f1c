"""Share from folder to folder, and the plan that options mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layershare.errors import OptionError, PlanError
from layershare.measure.brief import brief, origin, result_of
from layershare.plan import SharingPlan
from layershare.presets import FIXED
from layershare.sharing import make_plan, share
from layershare.sharing.carry import remember
from layershare.sharing.convert import Fit
from layershare.sharing.layout import find
from layershare.sharing.ranks import d_rank
from layershare.stacks import find_stacks
from layershare.store.open import (
    copy_preprocessing,
    load_model,
    load_processor,
    local_folder,
    new_folder,
    outline,
)
from layershare.store.shards import SHARD_SIZE
from layershare.store.stream import share_stream
from layershare.tasks import Task, get_task
from layershare.tasks.calibration import TEXTS, sample_batches

# Least squares on fewer texts overfit, and no healing follows here that would mend it.
ALONE = 1024


def share_folder(
    model: str | Path,
    out: str | Path,
    *,
    plan: str | Path | None = None,
    calibration: Sequence[Path] = (),
    task: str | Task | None = None,
    reading: Mapping[str, Any] | None = None,
    stream: bool = False,
    fit: Fit = "inputs",
    **options: Any,
) -> Any:
    """Share ``model`` and save it as ``out`` with its tokenizer, plan and a Result of the sizes, without healing.

    Returns the student.

    plan: a plan file; else ``options`` for :func:`layershare.make_plan`. calibration: files to fit the shared tensors
    on, read as ``task`` does, with ``reading`` as its arguments (default: every row counts). stream: from file to file,
    for checkpoints larger than memory; the same files come out, and the student returned has names and shapes alone.
    fit: see :func:`layershare.share`.
    Raises OptionError, PlanError, ModelError, DataError, and StoreError if there is something in ``out``.
    """
    if calibration and task is None:
        raise OptionError("--calibration needs --task, which says how the file is read.")
    if fit != "inputs" and not calibration:
        raise OptionError(f"--fit {fit} needs --calibration, texts to fit on.")
    if calibration and stream:
        raise OptionError("--stream cannot run the model on a calibration file.", "Leave out one of the two.")
    with new_folder(out) as folder:
        original = outline(model) if stream else load_model(model)
        batches, told = None, dict[str, Any]()
        if calibration and task is not None:
            kind = get_task(task)
            how = reading or {"split": (1.0, 0.0, 0.0)}
            found, seed = kind.read(list(calibration), **how), how.get("seed", 0)
            notes = [*found.notes, f'Settings: {{"fit": "{fit}"}}']
            told = {"task": kind, "data": found.describe(), "seed": seed, "notes": notes}
            texts = ALONE if fit == "sequential" else TEXTS
            processor = load_processor(model, kind.processor)
            batches = sample_batches(kind, processor, found, original.config, texts=texts)
        measured = plan is None and options.get("preset") == "d_rank" and batches is not None
        made = (
            d_rank_of(original, options, batches)
            if measured
            else plan_for(find_stacks(original), plan, **options)
        )
        if stream:
            student = share_stream(original, made, local_folder(model), folder)
        else:
            student = share(original, made, calibration=batches, fit=fit)
            if batches is not None:
                remember(
                    student, **origin(model, kind, found, seed, fit=fit, split=list(how.get("split", ())))
                )
            student.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        copy_preprocessing(model, folder)
        made.save(folder / "plan.toml")
        result_of(
            [brief("before", original, {}, model), brief("shared", student, {}, folder)],
            source=model,
            plan=made,
            **told,
        ).save(folder / "result.json")
    return student


def d_rank_of(model: Any, options: Mapping[str, Any], batches: Any) -> SharingPlan:
    """The plan of the preset ``d_rank``, on ``batches``. Raises PlanError for options that it has no use for."""
    unused = {"merge": "mean", "rank": 0, "unique": None, "parts": None}
    if wrong := next(
        (name for name, default in unused.items() if options.get(name, default) != default), None
    ):
        raise PlanError(f"preset 'd_rank' takes no {wrong} = {options[wrong]}.", "Give a budget.")
    if (budget := options.get("budget")) is None or not 0 < budget < 1:
        raise PlanError("preset 'd_rank' needs a budget.", "Give a fraction of the layer parameters.")
    stacks = find_stacks(model)
    chosen = stacks if options.get("stack") is None else (find(stacks, options["stack"]),)
    return SharingPlan(stacks=tuple(d_rank(model, stack, budget, batches) for stack in chosen))


def plan_for(
    stacks: Any, plan: str | Path | None = None, *, preset: str = "adjacent", **options: Any
) -> SharingPlan:
    """The plan of a file, or else of a preset. ``options``: see :func:`layershare.make_plan`."""
    return SharingPlan.load(plan) if plan is not None else make_plan(stacks, preset, **options)


def from_the_start(
    plan: str | Path | None, preset: str, unique: int | None, budget: float | None
) -> SharingPlan | dict[str, Any] | None:
    """A plan, or what makes one of a fresh model; None where nothing is to be shared."""
    if plan is not None:
        return SharingPlan.load(plan)
    if unique is None and budget is None and preset not in FIXED:
        return None
    return {"preset": preset, "unique": unique, "budget": budget}
