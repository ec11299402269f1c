"""What happens beside the training steps: averaging, guarding, recording, showing progress. For ``train``."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from layershare.errors import TrainingError


class Ema(TrainerCallback):
    """An exponential moving average of the trainable weights, kept in every checkpoint.

    The decay grows as (1 + t) / (10 + t) up to ``decay``, so that the start is soon forgotten.
    """

    FILE = "average.safetensors"

    def __init__(self, decay: float, checkpoint: Path | None) -> None:
        self._decay = decay
        self._checkpoint = checkpoint
        self._average: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        weights = _trainable(model)
        if self._checkpoint is None:
            self._average = {name: weight.clone() for name, weight in weights.items()}
        else:
            stored = load_file(self._checkpoint / self.FILE)
            self._average = {name: stored[name].to(weight.device) for name, weight in weights.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        weights = _trainable(model)
        decay = min(self._decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(
            list(self._average.values()), [weights[name] for name in self._average], 1 - decay
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE
            part = path.with_suffix(".part")
            save_file({name: value.contiguous() for name, value in self._average.items()}, part)
            os.replace(part, path)  # its presence says that the checkpoint is complete

    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights."""
        for name, weight in _trainable(model).items():
            weight.copy_(self._average[name])


class Guard(TrainerCallback):
    """Never lets a broken checkpoint be written, and turns Ctrl-C into a checkpoint and an orderly end."""

    def __init__(self) -> None:
        self.interrupted = False

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """Within it the first Ctrl-C only asks for a stop; the second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread set signal handlers
            return

        def on_interrupt(*_: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        if self.interrupted:
            # Logged too: the means since the last log are not part of a checkpoint.
            control.should_log = control.should_save = control.should_training_stop = True
        if control.should_save and not all(bool(torch.isfinite(p).all()) for p in _trainable(model).values()):
            raise TrainingError(
                f"The weights are no longer finite numbers after step {state.global_step}.",
                f"Lower learning_rate (now {args.learning_rate:g}); {kept(args)}",
            )
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        # Left on, Trainer would write the last checkpoint twice: at the step's and at the epoch's end.
        control.should_save = False
        return control


class Terms(TrainerCallback):
    """Adds the mean of each term of the loss to the log."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count one step's terms, without waiting for the device."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            means = {name: float(total) / self._steps for name, total in self._sums.items()}
            state.log_history[-1].update(means)
            self._sums, self._steps = {}, 0


class Progress(TrainerCallback):
    """A bar on a terminal; elsewhere, a line for about every tenth of the run. Both on standard error."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._begun = (0, 0.0)
        self._tenth = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = (state.global_step, time.monotonic())
        self._tenth = 10 * state.global_step // state.max_steps
        if state.is_world_process_zero and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if self._bar:
            self._bar.update(self._task, description=f"training, loss {logs['loss']:.4g}")
            return
        tenth = 10 * state.global_step // state.max_steps
        if tenth > self._tenth:
            self._tenth = tenth
            first, begun = self._begun
            pace = (time.monotonic() - begun) / max(1, state.global_step - first)
            left = pace * (state.max_steps - state.global_step)
            step = f"step {state.global_step} of {state.max_steps}"
            tell(f"training: {step}, loss {logs['loss']:.4g}, {left:.0f} s left")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; also after an error, when ``on_train_end`` is never called."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def kept(args: Any) -> str:
    """What is left of a run that cannot go on."""
    if any(Path(args.output_dir).glob("checkpoint-*")):
        return f"the last good checkpoint is kept in {args.output_dir}."
    return "there was no checkpoint yet."


def tell(text: str) -> None:
    """On standard error, which is for what happens."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """Trainable weights by name, each shared one once, detached from the graph but not copied."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
