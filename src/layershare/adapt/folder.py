"""Adapt from folder to folder: a model in, a PEFT adapter folder out."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from layershare.adapt.config import AdaptConfig
from layershare.adapt.labels import check_labelled, learn
from layershare.adapt.matching import MatchConfig, match
from layershare.adapt.methods import adapt, load_peft
from layershare.heal.fit import check_labels, check_processors, check_words
from layershare.measure.brief import Judge, brief, result_of, timed
from layershare.result import Result
from layershare.sharing import plan_of
from layershare.store.open import copy_preprocessing, load_model, load_processor, new_folder
from layershare.tasks import Task, get_task


def adapt_folder(
    model: str | Path,
    task: str | Task,
    data: Sequence[Path],
    out: str | Path,
    *,
    config: AdaptConfig | None = None,
    training: MatchConfig | None = None,
    teacher: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    test: Sequence[Path] = (),
    validation: Sequence[Path] = (),
    resume: bool = True,
) -> Result:
    """Train small modules on the frozen ``model`` and save them, with the tokenizer, as the adapter folder ``out``.

    With ``teacher``, a large model, its outputs are matched and no labels are needed; without, the labels of the data
    are learnt. Until it is done, the checkpoints are in ``OUT.part``; the same call goes on from the last one.
    With ``resume`` False it begins anew. ``test``, ``validation``: files whose texts are not trained on; default: parts
    of ``data``, held out.

    Returns a Result, also in ``out/result.json``: the base, then the base with the modules, judged on a part of the
    held-out texts. Raises StoreError if there is something in ``out``, and OptionError, DataError, ModelError,
    DependencyError and TrainingError.
    """
    load_peft()
    kind, config, training = get_task(task), config or AdaptConfig(), training or MatchConfig()
    found = kind.read(data, columns=columns, test=test, validation=validation, seed=training.seed)
    seconds: dict[str, float] = {}
    with new_folder(out, resume=True) as folder:
        base, tokenizer = load_model(model, kind.auto_class), load_processor(model, kind.processor)
        kind.check(found, base.config)
        if teacher is None:
            check_labelled(kind)
            large = None
        else:
            large = load_model(teacher, kind.auto_class)
            check_processors(tokenizer, load_processor(teacher, kind.processor))
            check_words(base, large, tokenizer)
            if kind.head is not None:
                check_labels(base.config, large.config)
        adapted = adapt(base, config)
        judge = Judge(kind, tokenizer, found, training.max_length, large)
        with timed("judge before", seconds):
            before = brief("before", base, judge(base), model)
        with timed("train", seconds):
            if large is not None:
                history = match(adapted, large, tokenizer, kind, found, training, folder, resume=resume)
            else:
                history = learn(adapted, tokenizer, kind, found, training, folder, resume=resume)
        adapted.cpu()
        with timed("judge after", seconds):
            metrics = judge(adapted)
        adapted.save_pretrained(folder)
        copy_preprocessing(model, folder)
        result = result_of(
            [before, brief("adapted", adapted, metrics, folder)],
            source=model, task=kind, metric=judge.metric, data=found.describe(),
            seed=training.seed, settings=training, plan=plan_of(base), history=history, seconds=seconds,
            threads=torch.get_num_threads(),
            notes=[
                *found.notes,
                *judge.notes,
                "The bytes are those of the adapter alone; it needs its base beside it.",
                f"Adapter: {json.dumps(config.model_dump(mode='json'))}",
            ],
        )  # fmt: skip
        result.save(folder / "result.json")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result
