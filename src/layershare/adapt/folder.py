"""Adapt from folder to folder: a model in, a PEFT adapter folder out."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from layershare.adapt.config import AdaptConfig
from layershare.adapt.labels import learn
from layershare.adapt.matching import MatchConfig, match
from layershare.adapt.methods import adapt, load_peft
from layershare.store.open import copy_preprocessing, load_model, load_tokenizer, new_folder
from layershare.tasks import get_task


def adapt_folder(
    model: str | Path,
    task: str,
    data: Sequence[Path],
    out: str | Path,
    *,
    config: AdaptConfig | None = None,
    training: MatchConfig | None = None,
    teacher: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    test: Sequence[Path] = (),
    validation: Sequence[Path] = (),
) -> list[dict[str, float]]:
    """Train small modules on the frozen ``model`` and save them, with the tokenizer, as the adapter folder ``out``.

    With ``teacher``, a large model, its outputs are matched and no labels are needed; without, the labels of the data
    are learnt. Until it is done, the checkpoints are in ``OUT.part``; the same call goes on from the last one.
    ``test``, ``validation``: files whose texts are not trained on; default: parts of ``data``, held out.
    Returns the history of the training. Raises StoreError if there is something in ``out``, and OptionError, DataError,
    ModelError, DependencyError and TrainingError.
    """
    load_peft()
    kind, config, training = get_task(task), config or AdaptConfig(), training or MatchConfig()
    found = kind.read(data, columns=columns, test=test, validation=validation, seed=training.seed)
    with new_folder(out, resume=True) as folder:
        base, tokenizer = load_model(model, kind.auto_class), load_tokenizer(model)
        kind.check(found, base.config)
        adapted = adapt(base, config)
        if teacher is not None:
            large = load_model(teacher, kind.auto_class)
            history = match(adapted, large, tokenizer, kind, found, training, folder)
        else:
            history = learn(adapted, tokenizer, kind, found, training, folder, max_length=training.max_length)
        adapted.save_pretrained(folder)
        copy_preprocessing(model, folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return history
