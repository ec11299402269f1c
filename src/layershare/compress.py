"""compress: share, heal, measure, report, as one resumable run into one folder.

``OUT`` is the model folder itself; ``OUT/baseline-drop`` holds the baseline, if one was asked for. A stage's folder
appears whole or not at all and a second run with the same inputs finds it, see :mod:`layershare.stages`.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from layershare import __version__, report, stages
from layershare.errors import OptionError
from layershare.heal.callbacks import tell
from layershare.heal.choose import kept_notes
from layershare.heal.config import DistillConfig
from layershare.heal.distill import distill
from layershare.heal.folder import layer_map
from layershare.measure import compare
from layershare.measure.brief import origin, result_of, timed
from layershare.measure.compare import held_out
from layershare.plan import SharingPlan
from layershare.result import Result, write_atomic
from layershare.search.bench import bench_of
from layershare.search.within import need_optuna, search_within
from layershare.sharing import make_plan, predict, share
from layershare.sharing.carry import refuse_shared, remember
from layershare.sharing.folder import budget_of
from layershare.sharing.moments import Moments, measure
from layershare.sharing.search import SEARCHED
from layershare.sharing.statistics import texts_in
from layershare.stacks import find_stacks
from layershare.store.open import (
    copy_preprocessing,
    load_answering,
    load_processor,
    local_folder,
    new_folder,
    sketch,
)
from layershare.store.shards import SHARD_SIZE
from layershare.tasks import Data, Task, get_task
from layershare.tasks.answers import answer_of, output_change
from layershare.tasks.calibration import sample_batches

BASELINES = ("drop",)
MOST = 0.999
"""A baseline drops something, however much a plan file stores."""


def compress(
    model: str | Path,
    *,
    task: str | Task,
    data: Sequence[Path],
    out: Path,
    test: Path | None = None,
    validation: Path | None = None,
    budget: float | None = None,
    plan: Path | None = None,
    scheme: str = "auto",
    unique: int | None = None,
    baseline: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Compress ``model`` for ``task`` into the folder ``out``, and return what was reached.

    model: folder or hub name. data, test, validation: files, see :mod:`layershare.tasks`; without a test file a part of
    the data is held out, and no text is in two parts. budget: the most layer parameters to store, as a fraction of the
    original's; default 0.5. plan: a plan file, instead of a budget and a ``scheme`` (a name that
    :func:`layershare.make_plan` knows, ``auto``, or ``search``, see :mod:`layershare.search`). unique: how many
    positions of each stack ``auto`` keeps; default as many as change the answer least before healing.
    baseline: ``drop`` also makes a layer-dropped model, nearest in size and healed alike. steps: of healing, default
    those of :class:`~layershare.heal.config.DistillConfig`.

    Raises OptionError, DataError, ModelError, PlanError or StoreError before anything is written, and TrainingError
    when healing cannot go on. Ctrl-C keeps what is done; the same call goes on from there.
    """
    if plan is not None and budget is not None:
        raise OptionError("--budget does not go with --plan, which says what is stored.", "Leave out one.")
    budget = 0.5 if budget is None else budget
    if not 0 < budget < 1:
        raise OptionError(
            f"budget {budget:g} is out of range.", "Give a fraction of the layer parameters, as 0.5."
        )
    if baseline is not None and baseline not in BASELINES:
        raise OptionError(f"unknown baseline {baseline!r}.", f"Valid: {', '.join(BASELINES)}.")
    out, say = Path(out).expanduser(), progress or tell
    kind = get_task(task)
    stages.refuse_foreign(out)
    tested, judged = ([] if file is None else [file] for file in (test, validation))
    found = kind.read(data, test=tested, validation=judged, columns=columns, seed=seed)
    job = _Job(model, kind, found, steps, seed, say)
    if unique is not None and (plan is not None or scheme != "auto"):
        raise OptionError(
            "--unique is for --scheme auto.", "A plan file says itself which positions it drops."
        )
    more = {} if unique is None else {"unique": unique}
    wanted: dict[str, Any] = {"scheme": scheme, "budget": budget} | more
    if plan is not None:
        written = SharingPlan.load(plan)
        wanted, budget = written.to_dict(), predict(job.stacks, written).ratio
    job.check(wanted)
    if overwrite:
        stages.discard(out)
    made = {"shared": job.make(wanted, out)}
    if baseline is not None:
        smaller = {"scheme": baseline, "budget": min(budget, MOST)}
        made["layer drop"] = job.make(smaller, out / f"baseline-{baseline}")
    return _measured(job, made, out)


class _Job:
    """What all stages of one run have in common. The original model is loaded when first needed."""

    def __init__(
        self, model: str | Path, kind: Task, data: Data, steps: int | None, seed: int, say: Callable
    ) -> None:
        self.model, self.kind, self.data, self.say, self.seed = model, kind, data, say, seed
        self.folder = local_folder(model)
        outline = sketch(self.folder)
        refuse_shared(outline, model)
        self.stacks = find_stacks(outline)
        chosen = {"seed": seed} | ({} if steps is None else {"steps": steps})
        self.config = DistillConfig.parse(chosen)
        self._teacher: Any = None
        self._moments: Moments | None = None

    @property
    def teacher(self) -> Any:
        if self._teacher is None:
            self._teacher = load_answering(self.folder, self.kind.auto_class)
            self.kind.check(self.data, self._teacher.config)
        return self._teacher

    def check(self, wanted: dict[str, Any]) -> None:
        """Raise PlanError for a plan that cannot be, before anything is written or trained."""
        if "scheme" not in wanted:
            predict(self.stacks, SharingPlan.from_dict(wanted))
        elif wanted["scheme"] == "search":
            need_optuna()
        elif wanted["scheme"] not in SEARCHED:
            make_plan(self.stacks, wanted["scheme"], budget=wanted["budget"])
        elif wanted["scheme"] == "auto":
            budget_of(self.stacks, preset="auto", budget=wanted["budget"], unique=wanted.get("unique"))

    def plan(self, wanted: dict[str, Any], calibration: list[dict[str, Any]], folder: Path) -> SharingPlan:
        """The plan meant by ``wanted``: one written out, or a scheme and a budget. A search keeps its trials in
        ``folder``."""
        if "scheme" not in wanted:
            return SharingPlan.from_dict(wanted)
        scheme, budget = wanted["scheme"], wanted["budget"]
        if scheme == "search":
            bench = bench_of(
                self.kind,
                self.teacher,
                load_processor(self.folder, self.kind.processor),
                self.data,
                self.moments,
            )
            return search_within(bench, budget, folder, seed=self.seed, progress=self.say)
        if scheme not in SEARCHED:
            return make_plan(self.stacks, scheme, budget=budget)
        change = partial(output_change, self.kind, self.teacher, calibration)
        measured = partial(self.moments, calibration)
        # Healed, factors without pivots are as good, and faster (docs/log.md).
        more = {"pivots": False} if scheme == "auto" else {}
        return SEARCHED[scheme](
            self.teacher, self.stacks, budget, change, measured, unique=wanted.get("unique"), **more
        )

    def moments(self, calibration: list[dict[str, Any]]) -> Moments:
        """What sharing needs to know of the original; measured once."""
        if self._moments is None:
            self.say(f"measure what {len(calibration)} batches of {self.kind.unit}s do in the original")
            self._moments = measure(self.teacher, calibration, answer=answer_of(self.kind))
        return self._moments

    def inputs(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides what a stage makes."""
        return {
            "layershare": __version__,
            "model": stages.fingerprint(self.folder),
            "task": self.kind.name,
            "setting of the task": dict(self.kind.settings),
            "data": self.data.describe(),
            "plan": wanted,
            "heal": self.config.model_dump(mode="json"),
        }

    def make(self, wanted: dict[str, Any], out: Path) -> Path:
        """The stage: a shared and healed model in ``out``."""

        def fill(folder: Path) -> dict[str, Any]:
            with new_folder(folder, resume=True) as part:
                seconds, history = self._fill(wanted, part)
                shutil.rmtree(part / "checkpoints", ignore_errors=True)
            return {"seconds": seconds, "history": history}

        if not stages.make(out, self.inputs(wanted), fill):
            self.say(f"{out}: already made, reused")
        return out

    def _fill(self, wanted: dict[str, Any], folder: Path) -> tuple[dict[str, float], list[dict]]:
        seconds: dict[str, float] = {}
        tokenizer = load_processor(self.folder, self.kind.processor)
        batches = sample_batches(self.kind, tokenizer, self.data, self.teacher.config)
        with timed("plan", seconds):
            if not (saved := folder / "plan.toml").exists():
                write_atomic(saved, self.plan(wanted, batches, folder).to_toml())
            plan = SharingPlan.load(saved)
            self.say(f"\n{plan.picture()}\n")
        with timed("share", seconds):
            # Fitted in order a model begins better, but is not better once it is healed (docs/log.md).
            if plan.tables:  # they count tokens, which moments do not tell
                student = share(self.teacher, plan, calibration=batches, fit="answer")
            else:
                known = self.moments(batches) if plan.uses_activations else None
                student = share(self.teacher, plan, calibration=known)
        told = {
            "texts": texts_in(batches),
            "heal": self.config.model_dump(mode="json"),
        }
        remember(student, **origin(self.model, self.kind, self.data, self.seed, plan=wanted, **told))
        with timed("heal", seconds):
            self.say(f"heal: {self.config.steps} steps of {self.config.batch_size} {self.kind.unit}s")
            history = distill(
                student, self.teacher, tokenizer, self.kind, self.data, self.config, folder,
                layer_map=layer_map(plan, student),
            )  # fmt: skip
        for line in kept_notes(history, self.config):
            self.say(line)
        student.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        copy_preprocessing(self.folder, folder)
        return seconds, history


def _measured(job: _Job, made: Mapping[str, Path], out: Path) -> Result:
    """Compare the original with everything made; write result.json, report and card. Reused if nothing has changed."""
    records = {label: stages.record(folder) for label, folder in made.items()}
    key = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()[:16]
    if (out / "result.json").exists():
        old = Result.load(out)
        if old.data.get("stages") == key:
            report.write(out)
            return old
    started = time.monotonic()
    figures = compare(
        {"original": job.folder, **made},
        job.kind,
        job.data,
        progress=lambda what: job.say(f"measure: {what}"),
    )
    first, plan = records["shared"] or {}, SharingPlan.load(out / "plan.toml")
    seconds = {**first.get("seconds", {}), "measure": round(time.monotonic() - started, 1)}
    result = result_of(
        figures, source=job.model, task=job.kind, metric=job.kind.metric_of(held_out(job.data)),
        data=job.data.describe() | {"stages": key},  # what was measured, so that a second run knows it
        seed=job.seed, settings=job.config, plan=plan, history=first.get("history", []), seconds=seconds,
        notes=[*job.data.notes, *kept_notes(first.get("history", []), job.config)],
    )  # fmt: skip
    result.save(out / "result.json")
    report.write(out)
    return result
