"""Distillation: train the shared model (student) to do what the original (teacher) does. Needs no labels."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from layershare.config import Config
from layershare.errors import DataError, ModelError, OptionError
from layershare.heal import losses
from layershare.heal.teacher import Ask, Target, cache_bytes, cached, live
from layershare.tasks import Data, Task
from layershare.tasks.encoding import INPUTS, pad, usable_length
from layershare.tasks.task import Outputs
from layershare.train import TrainConfig, length_grouped_order, train

LayerMap = Sequence[tuple[int, int]]
"""(student position, teacher position) pairs, counted from 0: whose output is compared with whose."""


class LossWeights(Config):
    """The weight of each term of the loss; 0 leaves it out, and so does a task without such an output."""

    embedding: float = Field(10.0, ge=0, description="1 - cosine to the teacher's embedding.")
    similarity: float = Field(
        100.0, ge=0, description="Squared difference of the cosines between texts of a batch."
    )
    hidden: float = Field(
        1.0, ge=0, description="Squared error of hidden states, relative to the teacher's size."
    )
    logits: float = Field(1.0, ge=0, description="(KL T^2 + lambda_mse MSE) / 2 of the class logits.")


class DistillConfig(TrainConfig):
    """How to distil: the fields of :class:`~layershare.train.TrainConfig`, and what is compared."""

    max_length: int = Field(128, ge=4, description="Longer training texts are cut to this many tokens.")
    weights: LossWeights = LossWeights()
    temperature: float = Field(
        2.0, gt=0, description="T of the KL term; higher looks more at unlikely classes."
    )
    lambda_mse: float = Field(1.0, ge=0, description="Weight of the MSE of logits beside the KL.")
    augment: float = Field(
        0.0, ge=0, lt=1, description="Chance of leaving out each token; the teacher then sees the same gaps."
    )
    dropout: bool = Field(False, description="Whether the student trains with its dropout.")
    train_embeddings: bool = Field(False, description="Whether embedding tables are trained too.")
    cache_mb: int = Field(
        4096,
        ge=0,
        description="Memory for the teacher's outputs; if they need more, they are computed at each step.",
    )


def distill(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    task: Task,
    data: Data,
    config: DistillConfig,
    out: str | Path,
    *,
    layer_map: LayerMap | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Train ``student`` in place, not ``teacher``. Returns the history of :func:`layershare.train.train`.

    The texts are the different ones of ``data.train``. What the teacher says of them is computed once and
    reused, unless texts are augmented or it would not fit ``config.cache_mb``.

    Args:
        student, teacher: models of the task's kind with one tokenizer; hidden sizes must agree for the
            hidden term.
        layer_map: which hidden states are compared (default :func:`matching_layers` of the two depths). A
            student made by dropping layers is best given :func:`kept_layers`.
        out: checkpoints go to ``out/checkpoints``.
        resume: go on from the last checkpoint there.
        quiet: no progress on the terminal.

    Raises:
        DataError: no training text. ModelError: student and teacher do not fit each other, or not the data.
        OptionError: no loss is left, or a layer map that names a layer which is not there.
        TrainingError, KeyboardInterrupt: see :func:`layershare.train.train`.
    """
    if data.train is None:
        raise DataError("There is no training data.", "Give a file with texts; labels are not needed.")
    task.check(data, teacher.config)
    task.check(data, student.config)
    dataset = task.encode(tokenizer, data.train, usable_length(tokenizer, teacher.config, config.max_length))
    weights = _active_weights(task, config.weights)
    pairs = _layer_pairs(student, teacher, layer_map) if "hidden" in weights else []
    collator = Collator(tokenizer, config.augment, config.seed)
    ids = dataset["input_ids"][:]
    order = length_grouped_order([len(row) for row in ids], config.batch_size, config.steps, config.seed)
    ask = _asker(teacher, tokenizer, task, dataset, sorted({t for _, t in pairs}), order, config)

    def compute_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        model.train(config.dropout)
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        target = ask(inputs, batch["row"])
        outputs = task.forward(model, inputs, hidden_states=bool(pairs))
        return loss_terms(outputs, target, weights, pairs, config.temperature, config.lambda_mse)

    with _frozen_embeddings(student, not config.train_embeddings):
        return train(student, dataset, collator, compute_loss, config, out, resume=resume, quiet=quiet)


def loss_terms(
    outputs: Outputs,
    target: Target,
    weights: Mapping[str, float],
    pairs: LayerMap = (),
    temperature: float = 1.0,
    lambda_mse: float = 1.0,
) -> dict[str, Tensor]:
    """The weighted terms of the loss for one batch, by name; ``weights`` says which. 0 for equal models."""
    terms = {}
    if outputs.embedding is not None and target.embedding is not None:
        if "embedding" in weights:
            terms["embedding"] = losses.embedding_cosine(outputs.embedding, target.embedding)
        if "similarity" in weights:
            terms["similarity"] = losses.similarity(outputs.embedding, target.embedding)
    if outputs.logits is not None and target.logits is not None and "logits" in weights:
        terms["logits"] = losses.soft_and_hard(outputs.logits, target.logits, temperature, lambda_mse)
    if pairs and "hidden" in weights:
        each = [
            losses.hidden_mse(outputs.hidden_states[ours + 1], target.hidden[theirs], outputs.mask)
            for ours, theirs in pairs
        ]
        terms["hidden"] = torch.stack(each).mean()
    return {name: weights[name] * value for name, value in terms.items()}


def matching_layers(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Each student layer with the teacher layer at the same share of the depth; the last ones always match.

    >>> matching_layers(3, 6)
    [(0, 1), (1, 3), (2, 5)]
    """
    return [(i, round((i + 1) * teacher_layers / student_layers) - 1) for i in range(student_layers)]


def kept_layers(kept: Sequence[int], teacher_layers: int) -> list[tuple[int, int]]:
    """The layer map of a student that has only the teacher's layers ``kept`` (ascending, from 0).

    The output of a kept layer is what the next kept layer reads; in the teacher that is the output of the
    layer just before that one. The last output is compared with the teacher's last.

    >>> kept_layers([0, 3, 5], 6)
    [(0, 2), (1, 4), (2, 5)]
    """
    reads = [layer - 1 for layer in kept[1:]]
    return list(enumerate([*reads, teacher_layers - 1]))


class Collator:
    """Rows of token ids -> a padded batch with ``row`` [B], each token left out with chance ``augment``.

    What is left out follows from ``seed`` and the row's position in the run alone, so a resumed run leaves
    out the same. Special tokens stay, and so does at least one other token.
    """

    def __init__(self, tokenizer: Any, augment: float = 0.0, seed: int = 0) -> None:
        self._pad_with = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._augment = augment
        self._seed = seed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        kept = rows if not self._augment else [self._thinned(row) for row in rows]
        return {**pad(self._pad_with, kept), "row": torch.tensor([row["row"] for row in rows])}

    def _thinned(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        # Seeded by a text: torch's generator on the CPU looks at 32 bits of a seed only.
        rng = random.Random(f"{self._seed}/{row['position']}")
        draws = [2.0 if token in self._special else rng.random() for token in row["input_ids"]]
        kept = [i for i, draw in enumerate(draws) if draw >= self._augment]
        ordinary = [i for i, draw in enumerate(draws) if draw < 1]
        if ordinary and not set(kept) & set(ordinary):
            kept = sorted([*kept, max(ordinary, key=draws.__getitem__)])
        return {name: [row[name][i] for i in kept] for name in INPUTS if name in row}


def _asker(
    teacher: Any,
    tokenizer: Any,
    task: Task,
    dataset: Any,
    layers: Sequence[int],
    order: Sequence[int],
    config: Any,
) -> Ask:
    """The teacher, cached where that is possible and saves work."""
    repeats = len(set(order)) < len(order)
    needed = cache_bytes(dataset, order, layers, teacher.config.hidden_size)
    if config.augment or not repeats or needed > config.cache_mb * 2**20:
        return live(teacher, task, layers)
    from accelerate import PartialState  # type: ignore[import-untyped]

    device = PartialState().device
    return cached(teacher.to(device), task, tokenizer, dataset, layers, rows=order, device=device)


def _active_weights(task: Task, weights: LossWeights) -> dict[str, float]:
    classifies = task.metric == "accuracy"
    usable = ("hidden", "logits") if classifies else ("hidden", "embedding", "similarity")
    active = {name: value for name, value in weights.model_dump().items() if value > 0 and name in usable}
    if not active:
        raise OptionError(
            f"No loss is left for {task.name}: all usable weights are 0.",
            f"Raise one of {', '.join(usable)}.",
        )
    return active


def _layer_pairs(student: Any, teacher: Any, given: LayerMap | None) -> LayerMap:
    ours, theirs = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    if student.config.hidden_size != teacher.config.hidden_size:
        raise ModelError(
            f"The hidden sizes differ (student {student.config.hidden_size}, "
            f"teacher {teacher.config.hidden_size}).",
            "Set weights.hidden to 0, or give the original model as the teacher.",
        )
    pairs = matching_layers(ours, theirs) if given is None else list(given)
    for i, j in pairs:
        if not (0 <= i < ours and 0 <= j < theirs):
            raise OptionError(
                f"The layer map pairs student layer {i} with teacher layer {j}, "
                f"but the student has {ours} layers and the teacher {theirs}.",
                "Positions count from 0.",
            )
    return pairs


@contextmanager
def _frozen_embeddings(model: nn.Module, freeze: bool) -> Iterator[None]:
    """Within it, embedding tables take no gradient: large, hardly changed by healing, slow to update."""
    tables = [
        module.weight
        for module in model.modules()
        if freeze and isinstance(module, nn.Embedding) and module.weight.requires_grad
    ]
    for table in tables:
        table.requires_grad_(False)
    try:
        yield
    finally:
        for table in tables:
            table.requires_grad_(True)
