"""Distil from folder to folder: a shared model in, a healed one out, with everything to load it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layershare.errors import ModelError
from layershare.heal.choose import kept_notes
from layershare.heal.config import DistillConfig
from layershare.heal.distill import distill
from layershare.heal.fit import check_processors, check_words
from layershare.heal.layers import kept_layers, parts_of
from layershare.measure.brief import Judge, brief, result_of, timed
from layershare.plan import SharingPlan
from layershare.result import Result
from layershare.sharing import plan_of
from layershare.store.open import copy_preprocessing, load_model, load_processor, new_folder
from layershare.tasks import Task, get_task


def heal_folder(
    student: str | Path,
    teacher: str | Path,
    task: str | Task,
    data: Sequence[Path],
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    test: Sequence[Path] = (),
    validation: Sequence[Path] = (),
    config: DistillConfig | None = None,
    cache: str | Path | None = None,
    resume: bool = True,
) -> Result:
    """Train the model ``student`` to do what ``teacher`` does on the texts of ``data``, and save it as ``out``.

    Until it is done, the checkpoints are in ``OUT.part``; the same call goes on from the last one, or with ``resume``
    False begins anew. ``cache``: a folder in which the teacher's outputs are kept for other runs.
    ``test``, ``validation``: files whose texts are not trained on; default: parts of ``data``, held out.

    Returns a Result, also in ``out/result.json``: the teacher, the student afterwards and before, judged on a part of
    the held-out texts. Raises StoreError if there is something in ``out``, and OptionError, DataError, ModelError and
    TrainingError.
    """
    kind, config = get_task(task), config or DistillConfig()
    found = kind.read(data, columns=columns, test=test, validation=validation, seed=config.seed)
    seconds: dict[str, float] = {}
    with new_folder(out, resume=True) as folder:
        model, original = load_model(student, kind.auto_class), load_model(teacher, kind.auto_class)
        plan, tokenizer = plan_of(model), load_processor(teacher, kind.processor)
        check_processors(_own_processor(student, kind.processor) or tokenizer, tokenizer)
        check_words(model, original, tokenizer)
        for one in (original, model):
            kind.check(found, one.config)
        judge = Judge(kind, tokenizer, found, config.max_length, original)
        with timed("judge before", seconds):
            figures = [brief("teacher", original, judge(original), teacher)]
            before = brief("before", model, judge(model))
        with timed("train", seconds):
            history = distill(
                model, original, tokenizer, kind, found, config, folder, layer_map=layer_map(plan, model), cache=cache,
                resume=resume,
            )  # fmt: skip
        model.cpu(), original.cpu()
        with timed("judge after", seconds):
            metrics = judge(model)
        model.save_pretrained(folder)
        copy_preprocessing(teacher, folder)
        if plan is not None:
            plan.save(folder / "plan.toml")
        result = result_of(
            [*figures, brief("distilled", model, metrics, folder), before],
            source=student, task=kind, metric=judge.metric, data=found.describe(),
            seed=config.seed, settings=config, plan=plan, history=history, seconds=seconds,
            threads=torch.get_num_threads(), notes=[*found.notes, *judge.notes, *kept_notes(history, config)],
        )  # fmt: skip
        result.save(folder / "result.json")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def layer_map(plan: SharingPlan | None, model: Any) -> list[tuple[int, int]] | None:
    """Whose hidden states are compared: for a dropped model what the kept layers' readers saw; None: layer by layer."""
    if len(parts_of(model)) > 1:  # two stacks
        return None
    dropped = [stack for stack in plan.stacks if stack.drop] if plan is not None else []
    return kept_layers(dropped[0].kept, dropped[0].length) if len(dropped) == 1 else None


def _own_processor(model: str | Path, auto_class: str) -> Any:
    """None for a folder of weights alone."""
    try:
        return load_processor(model, auto_class)
    except ModelError:
        return None
