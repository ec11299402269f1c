"""Share from folder to folder, and the plan that options mean."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
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
from layershare.sharing.make import MEASURED
from layershare.sharing.moments import Moments, measure
from layershare.sharing.search import SEARCHED, apart
from layershare.stacks import Stack, find_stacks
from layershare.store.open import (
    copy_preprocessing,
    load_answering,
    load_model,
    load_processor,
    local_folder,
    new_folder,
    outline,
)
from layershare.store.shards import SHARD_SIZE
from layershare.store.stream import share_stream
from layershare.tasks import Task, get_task
from layershare.tasks.answers import answer_of, output_change
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
    fit: Fit | None = None,
    samples: int | None = None,
    **options: Any,
) -> Any:
    """Share ``model`` and save it as ``out`` with its tokenizer, plan and a Result of the sizes, without healing.

    Returns the student.

    plan: a plan file; else ``options`` for :func:`layershare.make_plan`. calibration: files to fit the shared tensors
    on, read as ``task`` does, with ``reading`` as its arguments (default: every row counts). stream: from file to file,
    for checkpoints larger than memory; the same files come out, and the student returned has names and shapes alone.
    fit: see :func:`layershare.share`; default "answer" for the preset ``auto``, else "inputs". samples: how many texts
    (images, recordings) of the calibration to use; default 256, and 1,024 for "sequential".
    Raises OptionError, PlanError, ModelError, DataError, and StoreError if there is something in ``out``.
    """
    if calibration and task is None:
        raise OptionError("--calibration needs --task, which says how the file is read.")
    if (fit not in (None, "inputs") or samples is not None) and not calibration:
        given = f"fit {fit}" if samples is None else f"samples {samples}"
        raise OptionError(f"--{given} needs --calibration, texts to fit on.")
    if samples is not None and samples < 1:
        raise OptionError(f"--samples {samples} is too few.", "Give 1 or more.")
    scheme = None if plan is not None else options.get("preset")
    fit = fit or ("answer" if scheme == "auto" else "inputs")
    if calibration and stream:
        raise OptionError("--stream cannot run the model on a calibration file.", "Leave out one of the two.")
    with new_folder(out) as folder:
        kind = get_task(task) if calibration and task is not None else None
        if kind is not None and scheme in MEASURED:
            original = load_answering(model, kind.auto_class)
        else:
            original = outline(model) if stream else load_model(model)
        batches, told = None, dict[str, Any]()
        if kind is not None:
            how = reading or {"split": (1.0, 0.0, 0.0)}
            found, seed = kind.read(list(calibration), **how), how.get("seed", 0)
            texts = samples or (ALONE if fit == "sequential" else TEXTS)
            how_fitted = {"fit": fit, "samples": texts}
            notes = [*found.notes, f"Settings: {json.dumps(how_fitted)}"]
            told = {"task": kind, "data": found.describe(), "seed": seed, "notes": notes}
            processor = load_processor(model, kind.processor)
            batches = sample_batches(kind, processor, found, original.config, texts=texts)
        known = None
        if kind is not None and batches is not None and scheme in MEASURED:
            made, known = searched(original, kind, batches, fit, **options)
        else:
            made = plan_for(find_stacks(original), plan, **options)
        if stream:
            student = share_stream(original, made, local_folder(model), folder)
        else:
            student = share(original, made, calibration=batches, fit=fit, known=known)
            if kind is not None:
                remember(
                    student,
                    **origin(model, kind, found, seed, split=list(how.get("split", ())), **how_fitted),
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


def searched(
    model: Any,
    kind: Task,
    batches: list[dict[str, Any]],
    fit: Fit,
    *,
    preset: str,
    unique: int | None = None,
    **options: Any,
) -> tuple[SharingPlan, Moments | None]:
    """The plan of a preset that is read off the activations of ``batches``, and their moments if it asked for them.

    How many positions ``auto`` drops is judged by models that are fitted as ``fit`` says."""
    stacks, budget = budget_of(find_stacks(model), preset=preset, unique=unique, **options)
    known: Moments | None = None

    def measured() -> Moments:
        nonlocal known
        slopes = preset == "auto" or fit != "inputs"
        known = measure(model, batches, answer=answer_of(kind), slopes=slopes)
        return known

    more: dict[str, Any] = {}
    judging = batches
    if preset == "auto" and fit == "sequential" and unique is None:
        some, judging = apart(batches)
        more["fitted"] = lambda plan: share(model, plan, calibration=some, fit=fit, known=known)
    change = partial(output_change, kind, model, judging)
    return SEARCHED[preset](model, stacks, budget, change, measured, unique=unique, **more), known


def budget_of(
    stacks: Sequence[Stack], *, preset: str, budget: float | None = None, stack: str | None = None,
    unique: int | None = None, **options: Any,
) -> tuple[Sequence[Stack], float]:  # fmt: skip
    """What such a preset takes: the stacks to share, and a budget. Raises PlanError for other options.

    ``unique``, how many positions of each stack are kept, is for ``auto`` alone."""
    unused = {"merge": "mean", "rank": 0, "parts": None, "kv": False}
    unused |= {} if preset == "auto" else {"unique": None}
    options["unique"] = unique
    if wrong := next(
        (name for name, default in unused.items() if options.get(name, default) != default), None
    ):
        raise PlanError(f"preset {preset!r} takes no {wrong} = {options[wrong]}.", "Give a budget.")
    if budget is None or not 0 < budget < 1:
        raise PlanError(f"preset {preset!r} needs a budget.", "Give a fraction of the layer parameters.")
    taken = stacks if stack is None else [find(stacks, stack)]
    most = max((one.length for one in taken), default=0)
    if unique is not None and not 1 <= unique <= most:
        raise PlanError(f"unique = {unique} does not suit {most} layers.", f"Give 1 to {most}.")
    return taken, budget


def plan_for(
    stacks: Any, plan: str | Path | None = None, *, preset: str = "adjacent", **options: Any
) -> SharingPlan:
    """The plan of a file, or else of a preset. ``options``: see :func:`layershare.make_plan`; OptionError for those
    that are given beside a file."""
    if plan is None:
        return make_plan(stacks, preset, **options)
    defaults = {name: one.default for name, one in signature(make_plan).parameters.items()}
    if given := [name for name, value in options.items() if value != defaults[name]]:
        raise OptionError(
            f"--{given[0]} {options[given[0]]} and a plan file do not go together.",
            "The file says all: edit it, or leave it out.",
        )
    return SharingPlan.load(plan)


def from_the_start(
    plan: str | Path | None, preset: str, unique: int | None, budget: float | None
) -> SharingPlan | dict[str, Any] | None:
    """A plan, or what makes one of a fresh model; None where nothing is to be shared."""
    if plan is not None:
        return SharingPlan.load(plan)
    if unique is None and budget is None and preset not in FIXED:
        return None
    return {"preset": preset, "unique": unique, "budget": budget}
