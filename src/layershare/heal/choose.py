"""Which weights of a distillation are kept: those that were best on texts that were not trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from layershare.errors import DataError
from layershare.heal.best import Best
from layershare.heal.config import DistillConfig
from layershare.measure.brief import spread
from layershare.tasks import Data, Task

FEWEST = 32
"""On a smaller validation split nothing is chosen: there a figure moves by chance more than by healing."""


def choose(
    student: Any, teacher: Any, tokenizer: Any, task: Task, data: Data, config: DistillConfig
) -> Best | None:
    """What judges ``student`` while it trains, from the weights it has now on; None where the last ones are kept, as
    config says, or for want of a validation split that can be judged on (few rows, scores that are all the same)."""
    if config.keep == "last" or len(data.validation or ()) < FEWEST:
        return None
    rows = spread(data.validation, config.judge_rows)
    metric = task.metric_of(rows)
    asked = teacher if metric == "agreement" else None

    def judge(model: Any) -> Mapping[str, float]:
        return task.evaluate(model, tokenizer, rows, max_length=config.max_length, teacher=asked)

    try:
        start = judge(student)
    except DataError:
        return None
    return Best(
        judge, metric, task.higher_is_better, config.judge_every or config.steps, patience=0, start=start
    )


def settle(best: Best, student: Any, config: DistillConfig) -> int:
    """Give the trained ``student`` the best weights; returns the step they are of. An average of weights, which only
    the end of training gives, stays if it is better still."""
    if config.ema_decay and best.beaten_by(student):
        return config.steps
    best.restore(student)
    return best.step


def kept_notes(history: Sequence[Mapping[str, float]], config: DistillConfig) -> list[str]:
    """A sentence for the user about which weights were kept, where they are not the last."""
    step = history[-1].get("kept_step", config.steps) if history else config.steps
    if step == config.steps:
        return []
    if step:
        return [f"Kept the weights of step {step} of {config.steps}, the best on the validation split."]
    kept = "Healing does not help on the validation split: the weights it began with are kept."
    return [f"{kept} Try a lower learning_rate than {config.learning_rate:g}, or more steps."]
