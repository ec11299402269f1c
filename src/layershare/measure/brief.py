"""What a verb writes down of its own run: figures without a stopwatch, and all of it as a Result."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layershare import __version__
from layershare.config import Config
from layershare.measure.machine import machine
from layershare.measure.size import bytes_on_disk
from layershare.plan import SharingPlan
from layershare.result import Figures, Result, command, without_folders
from layershare.stages import fingerprint
from layershare.store.open import local_folder

if TYPE_CHECKING:
    from layershare.tasks import Data, Task

JUDGED = 512
"""A verb judges its own work on at most so many held-out rows; ``evaluate`` takes them all."""


def brief(label: str, model: Any, metrics: Mapping[str, float], folder: str | Path | None = None) -> Figures:
    """The parameters of ``model`` beside its ``metrics``; bytes on disk if ``folder`` is given and no hub name."""
    from layershare.sharing import count

    counts = count(model)
    return Figures(
        label=label,
        metrics=dict(metrics),
        parameters_unique=counts.unique,
        parameters_effective=counts.effective,
        layer_parameters_unique=counts.layer_unique,
        layer_parameters_effective=counts.layer_effective,
        bytes_on_disk=bytes_on_disk(path)
        if folder and (path := Path(folder).expanduser()).is_dir()
        else None,
    )


def result_of(
    models: Sequence[Figures],
    *,
    source: str | Path,
    task: "Task | None" = None,
    metric: str = "",
    data: Mapping[str, Any] | None = None,
    seed: int | None = None,
    settings: Config | None = None,
    plan: SharingPlan | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    seconds: Mapping[str, float] | None = None,
    threads: int | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """The Result of a run of any verb. Folders of the user's files are left out of it; it may be published.

    models: the original first. source: the model that went in. data: as ``Data.describe`` gives it.
    settings: noted in full, so that the run can be repeated.
    """
    told = dict(data or {})
    files = {file: Path(file).name for file in told.get("files", ())}
    for file, name in files.items():
        notes = [note.replace(file, name) for note in notes]
    if files:
        told |= {"files": without_folders(told["files"])} | (
            {"notes": list(notes)} if "notes" in told else {}
        )
    if settings is not None:
        notes = [*notes, f"Settings: {json.dumps(settings.model_dump(mode='json'))}"]
    return Result(
        source=path.absolute().name if (path := Path(source).expanduser()).exists() else str(source),
        machine=machine(threads),
        task=task.name if task is not None else "",
        metric=metric,
        unit="text" if task is None else task.unit,
        higher_is_better=task is None or task.higher_is_better,
        data=told,
        seed=seed,
        command=command(),
        models=list(models),
        plan=None if plan is None else plan.model_dump(mode="json"),
        plan_picture="" if plan is None else plan.picture(),
        history=[dict(entry) for entry in history],
        seconds=dict(seconds or {}),
        notes=list(notes),
    )


def origin(source: str | Path, task: "Task", data: "Data", seed: int, **settings: Any) -> dict[str, Any]:
    """What config.json says of how a shared model was made, so that anyone can make it again: of what model, on what
    data (by hash), for what task, with what seed and settings. JSON-ready, without folders."""
    path = Path(source).expanduser()
    return {
        "layershare": __version__,
        "source": path.absolute().name if path.exists() else str(source),
        "source_sha256": fingerprint(local_folder(source)),
        "task": task.name,
        **({"task_settings": dict(task.settings)} if task.settings else {}),
        "data_sha256": without_folders(data.sha256),
        "columns": dict(data.columns),
        "seed": seed,
        **settings,
    }


@dataclass(frozen=True)
class Judge:
    """Model -> its metrics on held-out data, the same for all models of a run. Without such data there are none."""

    task: "Task"
    tokenizer: Any
    data: "Data"
    max_length: int
    teacher: Any = None

    def __call__(self, model: Any) -> dict[str, float]:
        rows = self.rows
        if rows is None:
            return {}
        return self.task.evaluate(
            model, self.tokenizer, rows, max_length=self.max_length, teacher=self.teacher
        )

    @property
    def metric(self) -> str:
        """The headline figure, "" where there is none."""
        return "" if self.rows is None else self.task.metric_of(self.rows)

    @property
    def rows(self) -> Any:
        """At most :data:`JUDGED` rows, evenly spread, of the test split, or else of the validation split."""
        return None if self._part is None else spread(self._part, JUDGED)

    @property
    def notes(self) -> list[str]:
        """Says so where rows were left out."""
        held, rows = len(self._part or ()), len(self.rows or ())
        some = f"Judged on {rows:,} of {held:,} held-out rows, evenly spread; evaluate takes them all."
        return [some] if rows < held else []

    @property
    def _part(self) -> Any:
        return self.data.test if self.data.test is not None else self.data.validation


def spread(rows: Any, most: int) -> Any:
    """At most so many rows of a dataset, evenly spread; 0: all."""
    step = -(-len(rows) // most) if most else 1
    return rows.select(range(0, len(rows), step)) if step > 1 else rows


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Write the wall time of the block into ``seconds``."""
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 1)
