"""prune from folder to folder, with the batches that the importance needs made from files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layershare.errors import OptionError
from layershare.measure.brief import brief, result_of
from layershare.prune.config import PruneConfig
from layershare.prune.verb import Account, account, prune
from layershare.sharing import plan_of
from layershare.store.open import copy_preprocessing, load_model, load_processor, new_folder
from layershare.tasks import Task, get_task
from layershare.tasks.calibration import sample_batches


def prune_folder(
    model: str | Path,
    config: PruneConfig,
    out: str | Path,
    *,
    task: str | Task | None = None,
    data: Sequence[Path] = (),
    teacher: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Account:
    """Prune ``model`` and save it as ``out``, with its tokenizer and a Result, which holds sizes only.

    Importances are measured on the first texts of data.
    ``taylor`` takes the loss of the labels that the data has, or matches the outputs of ``teacher``.
    ``reading``: other arguments for the task's ``read``; default: every row counts.
    Raises StoreError if there is something in ``out``, and what :func:`layershare.prune.prune` raises; nothing is
    written then.
    """
    kind = get_task(task) if task is not None else None
    with new_folder(out) as folder:
        original = load_model(model, kind.auto_class if kind else None)
        batches = found = None
        if config.needs_batches:
            if kind is None or not data:
                raise OptionError(f"importance {config.by!r} is measured on data.", "Give --task and --data.")
            found = kind.read(list(data), columns=columns, **(reading or {"split": (1.0, 0.0, 0.0)}))
            kind.check(found, original.config)
            batches = sample_batches(
                kind, load_processor(model, kind.processor), found, original.config, labels=True
            )
        guide = load_model(teacher, kind.auto_class if kind else None) if teacher is not None else None
        pruned = prune(original, config, batches, teacher=guide)
        pruned.save_pretrained(folder)
        copy_preprocessing(model, folder)
        cut = account(original, pruned)
        result_of(
            [brief("before", original, {}, model), brief("pruned", pruned, {}, folder)],
            source=model, task=kind, data=None if found is None else found.describe(), settings=config,
            plan=plan_of(pruned), notes=str(cut).splitlines(),
        ).save(folder / "result.json")  # fmt: skip
    return cut
