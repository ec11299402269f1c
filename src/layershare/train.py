"""The one way to train: :func:`train`, on ``transformers.Trainer``. A method is the loss it passes in.

Same seed, same bits, also after SIGKILL: on a CPU the resumed run ends with the weights of an uninterrupted
one. Trainer does not promise it for batches grouped by length: its sampler draws each epoch's order from the
global random state, which dropout moves too and which is restored only after the order of a resumed epoch is
drawn (seen with transformers 5.23). Here the order of all texts of the whole run is drawn beforehand from the
seed alone and handed to Trainer as one long epoch.
"""

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from pydantic import Field
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from layershare.config import Config
from layershare.errors import OptionError, TrainingError
from layershare.heal.callbacks import Ema, Guard, Progress, Terms, kept
from layershare.heal.checkpoints import digest, digest_rows, resume_point
from layershare.prune.masks import held, masks_of
from layershare.sharing.carry import plan_of
from layershare.sharing.pivots import expand, has_pivots, with_pivots

ComputeLoss = Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]]
"""(model, collated batch) -> the weighted terms of the loss by name, scalars. Their sum is minimised."""

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
"""Rows of the dataset, with ``row`` (number) and ``position`` (place in the run, from 0) added -> a batch.

It must not draw from a global random state: whatever it draws must follow from the positions, or resuming is
not exact.
"""


class TrainConfig(Config):
    """How to train. Every method's config has these fields."""

    steps: int = Field(400, ge=1, description="Optimizer steps.")
    batch_size: int = Field(64, ge=1, description="Inputs a step, over all devices together.")
    learning_rate: float = Field(5e-4, gt=0, description="Peak of the learning rate (AdamW).")
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of the steps in which it rises from 0.")
    schedule: Literal["linear", "cosine"] = Field("linear", description="How it falls to 0 after that.")
    weight_decay: float = Field(0.01, ge=0, description="On matrices; biases and norms have none.")
    adam_beta2: float = Field(0.999, gt=0, lt=1, description="Memory of squared gradients (AdamW).")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this norm.")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Average the weights over steps with this decay; 0 keeps the last ones."
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast.")
    save_every: int = Field(
        0, ge=0, description="Steps between checkpoints; 0: about ten in a run, at least 50 apart."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the order of the texts, dropout and augmentation.")


def train(
    model: Any,
    dataset: Any,
    collator: Collator,
    compute_loss: ComputeLoss,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = True,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    lengths: Sequence[int] | None = None,
    made_of: Mapping[str, str] | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place, with checkpoints in ``out/checkpoints``, and leave it in eval mode.

    Args:
        model: a PreTrainedModel; checkpoints go through its ``save_pretrained``.
        dataset: rows of what the collator takes (``datasets.Dataset``, with ``labels`` where there are any).
        collator: rows -> batch, see :data:`Collator`.
        compute_loss: see :data:`ComputeLoss`.
        config: how to train.
        out: the folder of the run. Only ``out/checkpoints`` is written.
        resume: go on from the last complete checkpoint, if there is one; False removes the checkpoints.
        quiet: no progress on the terminal (standard error).
        callbacks: told of every step, for example to judge and stop. What they need to know after a resume must
            follow from the log history, which is part of a checkpoint.
        lengths: of the rows' inputs, to batch those of equal length together; default: of their ``input_ids``.
        made_of: name -> hash of what else decides the run, as the teacher; checkpoints of another are refused.

    Returns:
        One dict for each logged step: ``step``, ``loss``, each term of the loss by name, ``learning_rate``,
        ``grad_norm``. Values are means over the steps since the last entry. The steps before a resume are in
        it too.

    Raises:
        TrainingError: nothing to train on, a loss that is not finite (the last good checkpoint is kept), or
            checkpoints of another run in ``out``.
        KeyboardInterrupt: after Ctrl-C, when the step is finished and a checkpoint saved. A second Ctrl-C
            stops at once.
    """
    folder = Path(out) / "checkpoints"
    if not len(dataset):
        raise TrainingError("There is nothing to train on.")
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(
            "No parameter of the model is trainable.", "Nothing would change; check what is frozen."
        )
    if lengths is None:
        lengths = [len(row) for row in dataset["input_ids"]]
    order = length_grouped_order(lengths, config.batch_size, config.steps, config.seed)
    state = PartialState()
    with state.main_process_first():
        told = dict(made_of or {})
        inputs = digest_rows(dataset)
        if "labels" in getattr(dataset, "column_names", ()):
            told["labels"] = digest(dataset["labels"])
        checkpoint = resume_point(folder, model, inputs, config.model_dump(mode="json"), resume, told)
    world = state.num_processes
    if config.batch_size % world:
        raise OptionError(f"batch_size {config.batch_size} cannot be shared out evenly to {world} processes.")
    every = config.save_every or max(50, math.ceil(config.steps / 10))
    # Every save falls on a log, or a resume would lose the means since the last one.
    log_every = math.gcd(every, max(1, config.steps // 40))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size // world,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=round(config.warmup_ratio * config.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        adam_beta2=config.adam_beta2,
        bf16=config.precision == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),  # else Trainer takes bfloat16 for a demand on a GPU
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=log_every,
        logging_nan_inf_filter=False,  # it hides a NaN in the mean
        save_steps=every,
        save_total_limit=2,  # the older one is for the moment in which the newer one is being written
        report_to="none",
        disable_tqdm=True,
    )
    ema = [Ema(config.ema_decay, checkpoint)] if config.ema_decay else []
    guard, terms, progress = Guard(), Terms(), Progress()
    use_cache = getattr(model.config, "use_cache", None)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_InOrder(dataset, order),
        data_collator=collator,
        callbacks=[*ema, *callbacks, guard, terms, *([] if quiet else [progress])],
        terms=terms,
        terms_of=compute_loss,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with _quiet(), guard.catching_interrupts(), held(model):  # what was pruned stays zero
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
        if use_cache is not None:
            model.config.use_cache = use_cache  # Trainer switches it off, and it would be saved so
        model.eval()
    if guard.interrupted:
        raise KeyboardInterrupt(
            f"Stopped after step {trainer.state.global_step} of {config.steps}; "
            f"the same command goes on from the checkpoint in {folder}."
        )
    for average in ema:
        average.copy_to(model)
    return [_entry(log) for log in trainer.state.log_history if "loss" in log]


@contextmanager
def in_plain_factors(model: Any) -> Iterator[None]:
    """Within it pivoted maps are plain factors, in place, and afterwards have their pivots again.

    An optimizer moves all entries alike. Beside an identity they are of no common size, and some multiply the largest
    inputs: Gemma lost by the steps that heal plain factors (docs/log.md). Not for a model with pruned weights, whose
    zeros are those of the factors as they are.
    """
    plan = plan_of(model)
    if plan is None or not has_pivots(model) or masks_of(model):
        yield
        return
    orders = expand(model)
    try:
        yield
    finally:
        with_pivots(model, plan, orders)


def length_grouped_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """The rows of every batch of a run, end to end: ``steps * batch_size`` row numbers.

    Epochs are shuffled one by one and joined, so that no batch is short and no two rows differ by more than
    one in how often they occur. Within each stretch of 50 batches rows are grouped by length, which spares
    padding, and the batches are shuffled. The result depends on the arguments only.
    """
    rng = random.Random(seed)
    stream: list[int] = []
    while len(stream) < steps * batch_size:
        epoch = list(range(len(lengths)))
        rng.shuffle(epoch)
        stream += epoch
    order: list[int] = []
    stretch = 50 * batch_size
    for start in range(0, steps * batch_size, stretch):
        rows = sorted(stream[start : min(start + stretch, steps * batch_size)], key=lengths.__getitem__)
        groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(groups)
        order += [row for group in groups for row in group]
    return order


class _Trainer(Trainer):
    """Trainer whose loss is the sum of named terms."""

    def __init__(self, *args: Any, terms: Terms, terms_of: ComputeLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._terms = terms
        self._terms_of = terms_of

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        parts = self._terms_of(model, inputs)
        loss = torch.stack(list(parts.values())).sum()
        if not bool(torch.isfinite(loss)):
            bad = [name for name, value in parts.items() if not bool(torch.isfinite(value))]
            raise TrainingError(
                f"The loss is not a finite number at step {self.state.global_step + 1} "
                f"(term: {', '.join(bad) or 'the sum'}).",
                f"Lower learning_rate (now {self.args.learning_rate:g}) or raise warmup_ratio; {kept(self.args)}",
            )
        self._terms.add(parts)
        return (loss, {}) if return_outputs else loss


class _InOrder(torch.utils.data.Dataset):
    """The rows of a dataset in the order of the run, each with its ``row`` and ``position``."""

    def __init__(self, dataset: Any, order: Sequence[int]) -> None:
        self._dataset = dataset
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self._order[position]
        return {**self._dataset[row], "row": row, "position": position}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from speaking of what we have taken care of.

    That is: names of shared tensors that a checkpoint lacks, checkpoints written within one second, and a bar
    for the writing of each.
    """
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    before = [logger.level for logger in loggers]
    bars = is_progress_bar_enabled()
    disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if bars:
            enable_progress_bar()


def _entry(log: Mapping[str, float]) -> dict[str, float]:
    return {"step": log["step"], **{k: v for k, v in log.items() if k not in ("step", "epoch")}}
