"""plan --data: search a plan for a model and a budget, into a folder that keeps the trials."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layershare import __version__
from layershare.errors import DataError, DependencyError, OptionError, PlanError, StoreError
from layershare.heal.callbacks import tell
from layershare.measure.brief import brief, result_of
from layershare.result import Result, write_atomic
from layershare.search.beginning import Beginning
from layershare.search.budget import most_for_layers
from layershare.search.setting import Setting, task_for
from layershare.search.within import best_of, name_of, need_optuna, row_of, trials_of
from layershare.sharing.carry import refuse_shared
from layershare.stacks import find_stacks
from layershare.store.open import load_processor, local_folder, sketch
from layershare.tasks import get_task

RECORD = "search.json"
METRIC = "output change"


def search(
    model: str | Path,
    out: Path,
    *,
    budget: float,
    data: Sequence[Path],
    task: str | None = None,
    task_settings: Mapping[str, Any] | None = None,
    validation: Path | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    trials: int = 64,
    jobs: int = 1,
    storage: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Search the plan that changes the answers of ``model`` least within ``budget``; the folder ``out`` gets
    ``plan.toml``, ``result.json`` with all trials, and the storage.

    budget: a fraction of the layer parameters (below 1), or bytes of the whole model (then the embedding table may be
    factorised too). data: texts to fit on and to judge by, half each; with ``validation`` these judge. task: default
    what the class of the model is for. trials: in all; presets, ``auto`` and variations of it come first, so the plan
    found is no worse than any of them. jobs: processes. storage: the URL of a database that optuna speaks, default
    SQLite in ``out``; the same call on another machine with the same storage takes trials too.
    The same seed finds the same plan, however many jobs (up to rounding, where threads differ). The same call after an
    interruption goes on, and with more ``trials`` goes further.

    Raises OptionError, DataError, ModelError, PlanError, StoreError before anything is written, DependencyError if
    optuna is not installed.
    """
    need_optuna()
    from layershare.search.study import lead

    _check(budget, trials=trials, jobs=jobs)
    out, say = Path(out).expanduser(), progress or tell
    folder, outline = local_folder(model), sketch(model)
    refuse_shared(outline, model)
    find_stacks(outline)
    most_for_layers(outline, budget)
    kind = get_task(task or task_for(outline.config), task_settings, skip_bad=skip_bad)
    load_processor(folder, kind.processor)
    setting = Setting(
        folder, kind.name, dict(kind.settings), skip_bad, tuple(map(Path, data)),
        () if validation is None else (Path(validation),), columns, budget, seed,
        threads=max(1, torch.get_num_threads() // jobs),
    )  # fmt: skip
    found = setting.read()
    inputs = {"layershare": __version__} | setting.inputs(found)
    with _our_folder(out, inputs):
        url = storage or f"sqlite:///{(out / 'search.db').absolute()}"
        study = trials_of(url, name_of(inputs))
        write_atomic(out / RECORD, json.dumps({"inputs": inputs}, indent=1) + "\n")
        with _helpers(setting, url, inputs, jobs - 1):
            say(f"measure what the original does with the data, as {kind.name}")
            beginning = Beginning(setting.bench(found), budget)
            lead(study, trials, beginning, seed, say)
        return _finish(out, study, beginning, setting, found, model)


def _finish(out: Path, study: Any, beginning: Beginning, setting: Setting, found: Any, source: Any) -> Result:
    """Write the plan and the Result."""
    tried = study.finished
    best, plan = best_of(tried, setting.budget)
    bench = beginning.bench
    figures = [
        brief("original", bench.model, {METRIC: 0.0}),
        brief("best plan", bench.share(plan), {METRIC: best}),
    ]
    made = result_of(
        figures, source=source, task=setting.kind, metric=METRIC, data=found.describe(), seed=setting.seed,
        plan=plan, notes=[*found.notes, f"Settings: {json.dumps({'budget': setting.budget})}"],
    )  # fmt: skip
    rows = [row_of(one, bench.model, beginning.stacks) for one in tried]
    result = made.model_copy(update={"higher_is_better": False, "trials": rows})
    plan.save(out / "plan.toml")
    result.save(out / "result.json")
    return result


def _check(budget: float, **counts: int) -> None:
    if not budget > 0 or budget == 1:
        raise OptionError(
            f"budget {budget:g} is out of range.",
            "Give a fraction of the layer parameters below 1, or bytes.",
        )
    for name, value in counts.items():
        if value < 1:
            raise OptionError(f"{name} = {value} is too few.", "Give 1 or more.")


@contextmanager
def _our_folder(out: Path, inputs: Mapping[str, Any]) -> Iterator[None]:
    """``out``, which is new or of an earlier run with the same inputs; it goes away where nothing came of it."""
    old = out / RECORD
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not old.is_file()):
        raise StoreError(
            f"{out} exists and is not a folder of a search.", "Choose another folder, or empty it."
        )
    if old.is_file():
        was, wanted = json.loads(old.read_text())["inputs"], json.loads(json.dumps(inputs))
        if changed := [name for name in wanted if was.get(name, ...) != wanted[name]]:
            raise StoreError(
                f"{out} holds a search with another {changed[0]}.", "Choose another folder, or delete it."
            )
    new = not old.is_file()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except (DataError, PlanError, StoreError, DependencyError):
        if new:
            for name in (RECORD, "search.db"):
                (out / name).unlink(missing_ok=True)
            out.rmdir()
        raise


@contextmanager
def _helpers(setting: Setting, url: str, inputs: Mapping[str, Any], number: int) -> Iterator[None]:
    """So many other processes that run trials meanwhile. Started anew, not forked: threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    arguments = (setting, url, dict(inputs), os.getpid())
    helpers = [context.Process(target=_help, args=arguments, daemon=True) for _ in range(number)]
    try:
        for helper in helpers:
            helper.start()
        yield
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()


def _help(setting: Setting, url: str, inputs: Mapping[str, Any], parent: int) -> None:
    """Run trials until the process that leads ends this one, or is gone."""
    from layershare.search.study import follow

    try:
        bench = setting.bench(setting.read())
        follow(trials_of(url, name_of(inputs)), bench, lambda: os.getppid() == parent)
    except KeyboardInterrupt:
        pass
