"""Early stopping, and the best weights kept. For ``finetune`` and ``distill``; passed to
:func:`layershare.train.train`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from layershare.errors import TrainingError


class Best(TrainerCallback):
    """Judges every so many steps, keeps the weights of the best figure, stops when it has not risen for a while.

    Its memory is the log history, where each figure stands as ``validation_...``; so a resumed run decides as an
    uninterrupted one. Only a strictly better figure counts. The weights are in ``best-STEP.safetensors`` beside the
    checkpoints; an older file goes when a checkpoint that knows the newer one is complete.

    Args:
        judge: model -> figures by name.
        metric: the figure that counts.
        higher_is_better: its sense.
        every: steps between judgements; there is one at the end as well.
        patience: stop after so many judgements in a row without a better one; 0 never stops.
        start: the figures of the weights that training begins with; then they are the best until others are as good.
    """

    def __init__(
        self,
        judge: Callable[[Any], Mapping[str, float]],
        metric: str,
        higher_is_better: bool,
        every: int,
        patience: int,
        start: Mapping[str, float] | None = None,
    ) -> None:
        self._judge = judge
        self._key = f"validation_{metric}"
        self._sign = 1 if higher_is_better else -1
        self._every, self._patience = every, patience
        self._folder = Path()
        self.figure, self.step, self.misses = -float("inf"), 0, 0
        self.last = 0
        self._from_start = start is not None
        if start is not None:
            self.figure = self._sign * start[metric]

    @property
    def value(self) -> float:
        """The best figure."""
        return self._sign * self.figure

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return 0 < self._patience <= self.misses

    def beaten_by(self, model: Any) -> bool:
        """Whether a model is better than the best weights."""
        return self._sign * self._judge(model)[self._key.removeprefix("validation_")] > self.figure

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._folder = Path(args.output_dir)
        if self._from_start and state.global_step == 0 and state.is_world_process_zero:
            self._write(model)
        for log in state.log_history:
            if self._key in log:
                self._count(log[self._key], log["step"])
        self._tidy()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.stopped:  # resumed behind the end
            control.should_training_stop = True
        elif state.global_step % self._every == 0 or state.global_step == state.max_steps:
            control.should_log = control.should_save = True
        return control

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any
    ) -> Any:
        due = state.global_step % self._every == 0 or state.global_step == state.max_steps
        if due and not self.stopped and logs and "loss" in logs:
            figures = self._judge(model)
            state.log_history[-1].update({f"validation_{name}": value for name, value in figures.items()})
            if (
                self._count(state.log_history[-1][self._key], state.global_step)
                and state.is_world_process_zero
            ):
                self._write(model)
            control.should_training_stop = control.should_training_stop or self.stopped
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._tidy()

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Give the model the best weights."""
        try:
            stored = load_file(self._file)
        except OSError as error:
            raise TrainingError(
                f"The best weights, {self._file}, are gone ({error}).", "Use resume=False to start anew."
            ) from None
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[name])

    @property
    def _file(self) -> Path:
        return self._folder / f"best-{self.step}.safetensors"

    def _write(self, model: nn.Module) -> None:
        part = self._file.with_suffix(".part")
        save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, part)
        os.replace(part, self._file)

    def _count(self, figure: float, step: int) -> bool:
        self.last = step
        as_good = self._from_start and self.step == 0 and self._sign * figure == self.figure
        if better := self._sign * figure > self.figure or as_good:
            self.figure, self.step, self.misses = self._sign * figure, step, 0
        else:
            self.misses += 1
        return better

    def _tidy(self) -> None:
        for file in self._folder.glob("best-*"):
            if file != self._file:
                file.unlink()
