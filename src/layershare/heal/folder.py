"""Distil from folder to folder: a shared model in, a healed one out, with everything to load it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layershare.errors import ModelError
from layershare.heal.config import DistillConfig
from layershare.heal.distill import distill
from layershare.heal.fit import check_tokenizers
from layershare.heal.layers import kept_layers
from layershare.plan import SharingPlan
from layershare.sharing import plan_of
from layershare.store.open import copy_preprocessing, load_model, load_tokenizer, new_folder
from layershare.tasks import get_task


def heal_folder(
    student: str | Path,
    teacher: str | Path,
    task: str,
    data: Sequence[Path],
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    test: Sequence[Path] = (),
    validation: Sequence[Path] = (),
    config: DistillConfig | None = None,
    cache: str | Path | None = None,
) -> list[dict[str, float]]:
    """Train the model ``student`` to do what ``teacher`` does on the texts of ``data``, and save it as ``out``.

    Until it is done, the checkpoints are in ``OUT.part``; the same call goes on from the last one.
    ``cache``: a folder in which the teacher's outputs are kept for other runs.
    ``test``, ``validation``: files whose texts are not trained on; default: parts of ``data``, held out.
    Returns the history of the training, see :func:`layershare.heal.distill.distill`.
    Raises StoreError if there is something in ``out``, and OptionError, DataError, ModelError and TrainingError.
    """
    kind, config = get_task(task), config or DistillConfig()
    found = kind.read(data, columns=columns, test=test, validation=validation, seed=config.seed)
    with new_folder(out, resume=True) as folder:
        model, original = load_model(student, kind.auto_class), load_model(teacher, kind.auto_class)
        pairs, tokenizer = layer_map(plan_of(model)), load_tokenizer(teacher)
        check_tokenizers(_own_tokenizer(student) or tokenizer, tokenizer)
        history = distill(
            model, original, tokenizer, kind, found, config, folder, layer_map=pairs, cache=cache
        )
        model.save_pretrained(folder)
        copy_preprocessing(teacher, folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return history


def layer_map(plan: SharingPlan | None) -> list[tuple[int, int]] | None:
    """Whose hidden states are compared: for a dropped model what the kept layers' readers saw; None: layer by layer."""
    dropped = [stack for stack in plan.stacks if stack.drop] if plan is not None else []
    return kept_layers(dropped[0].kept, dropped[0].length) if len(dropped) == 1 else None


def _own_tokenizer(model: str | Path) -> Any:
    """None for a folder of weights alone."""
    try:
        return load_tokenizer(model)
    except ModelError:
        return None
