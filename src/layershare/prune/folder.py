"""prune from folder to folder, with the batches that the importance needs made from files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layershare.errors import DataError, OptionError
from layershare.prune.config import PruneConfig
from layershare.prune.verb import Account, account, prune
from layershare.store.open import copy_preprocessing, load_model, load_tokenizer, new_folder
from layershare.tasks import Data, get_task
from layershare.tasks.encoding import encode, pad, usable_length

TEXTS = 256


def prune_folder(
    model: str | Path,
    config: PruneConfig,
    out: str | Path,
    *,
    task: str | None = None,
    data: Sequence[Path] = (),
    teacher: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Account:
    """Prune ``model`` and save it as ``out``, with its tokenizer. Importances are measured on the first texts of data.

    ``taylor`` takes the loss of the labels of a classification task, or matches the outputs of ``teacher``.
    ``reading``: other arguments for the task's ``read``; default: every row counts.
    Raises StoreError if there is something in ``out``, and what :func:`layershare.prune.prune` raises; nothing is
    written then.
    """
    kind = get_task(task) if task is not None else None
    with new_folder(out) as folder:
        original = load_model(model, kind.auto_class if kind else None)
        batches = None
        if config.needs_batches:
            if kind is None or not data:
                raise OptionError(f"importance {config.by!r} is measured on data.", "Give --task and --data.")
            found = kind.read(list(data), columns=columns, **(reading or {"split": (1.0, 0.0, 0.0)}))
            kind.check(found, original.config)
            batches = batches_of(load_tokenizer(model), found, original.config)
        guide = load_model(teacher, kind.auto_class if kind else None) if teacher is not None else None
        pruned = prune(original, config, batches, teacher=guide)
        pruned.save_pretrained(folder)
        copy_preprocessing(model, folder)
        return account(original, pruned)


def batches_of(
    tokenizer: Any, data: Data, config: Any, texts: int = TEXTS, size: int = 32
) -> list[dict[str, Any]]:
    """Padded batches of the first ``texts`` rows to train on, in file order; ``labels`` too where there are classes."""
    import torch

    if data.train is None:
        raise DataError("There is no text to measure importance on.")
    rows = data.train.select(range(min(len(data.train), texts)))
    wanted = ("text", "text_pair") if data.labels else ("text",)
    sides = [rows[name][:] for name in wanted if name in rows.column_names]
    encoded = encode(
        tokenizer, sides[0], usable_length(tokenizer, config, 128), sides[1] if len(sides) > 1 else None
    )
    labels = None
    if data.labels:
        from layershare.tasks.text_classification import label_ids

        labels = torch.tensor(label_ids(rows["label"][:], config))
    found = []
    for start in range(0, len(sides[0]), size):
        group = range(start, min(start + size, len(sides[0])))
        batch = pad(tokenizer, [{name: column[i] for name, column in encoded.items()} for i in group])
        found.append(batch | ({"labels": labels[group.start : group.stop]} if labels is not None else {}))
    return found
