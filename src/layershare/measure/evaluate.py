"""Evaluate models on a data file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layershare.errors import OptionError
from layershare.measure.brief import result_of
from layershare.measure.compare import compare, held_out
from layershare.measure.opening import base_of
from layershare.result import Result

if TYPE_CHECKING:
    from layershare.tasks import Task


def evaluate(
    models: Sequence[str] | Mapping[str, str | Path],
    task: "str | Task",
    data: Sequence[Path],
    *,
    columns: Mapping[str, str] | None = None,
    test: Sequence[Path] = (),
    validation: Sequence[Path] = (),
    seed: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure ``models`` side by side; the first is the original. Judged on every row of ``data``, or on a part of it.

    models: folders or hub names, or label -> folder; an adapter folder is measured on its base, whose bytes count too.
    test: files to judge on instead of ``data``. seed: judge on what :func:`layershare.finetune.finetune` with this seed
    holds out of ``data`` for testing.

    Raises OptionError for an unknown task or a model named twice, DataError and ModelError.
    """
    from layershare.store.open import local_folder
    from layershare.tasks import get_task

    named = models if isinstance(models, Mapping) else {str(model): model for model in models}
    if len(named) < len(models):
        raise OptionError("A model is named twice.", "Name each one once.")
    kind = get_task(task)
    if test or seed is not None:
        found = kind.read(data, test=test, validation=validation, columns=columns, seed=seed or 0)
    else:
        found = kind.read(data, columns=columns, split=(1.0, 0.0, 0.0))
        found = replace(found, test=found.train if found.test is None else found.test)
    adapters = {label: folder for label, folder in named.items() if base_of(folder) is not None}
    folders = {
        label: Path(folder) if label in adapters else local_folder(folder) for label, folder in named.items()
    }
    return result_of(
        compare(folders, kind, found, progress=progress),
        source=next(iter(named.values())), task=kind, metric=kind.metric_of(held_out(found)), data=found.describe(),
        seed=seed,
        notes=[*found.notes, *(f"{label} is an adapter: its base is counted with it." for label in adapters)],
    )  # fmt: skip
