"""Evaluate models on a data file, all of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from layershare.errors import OptionError
from layershare.measure.compare import compare
from layershare.measure.machine import machine
from layershare.result import Result


def evaluate(
    models: Sequence[str],
    task: str,
    data: Sequence[Path],
    *,
    columns: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure ``models``, folders or hub names, side by side on every row of ``data``; the first is the original.

    Raises OptionError for an unknown task or a model named twice, DataError and ModelError.
    """
    from layershare.store.open import local_folder
    from layershare.tasks import get_task

    if len(set(models)) < len(models):
        raise OptionError("A model is named twice.", "Name each one once.")
    kind = get_task(task)
    found = kind.read(data, columns=columns, split=(1.0, 0.0, 0.0))
    found = replace(found, test=found.train)
    folders = {model: local_folder(model) for model in models}
    return Result(
        task=task,
        metric=kind.metric_of(found.test),
        higher_is_better=kind.higher_is_better,
        machine=machine(),
        data=found.describe(),
        models=compare(folders, kind, found, progress=progress),
        notes=list(found.notes),
    )
