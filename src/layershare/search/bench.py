"""What a trial does: share the model by a plan, and measure how far its answer has moved. Not healed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from layershare.plan import SharingPlan
from layershare.search.fitting import Fitted
from layershare.sharing.convert import begin, finish, in_original
from layershare.sharing.embedding import count_tokens, solve_table
from layershare.sharing.moments import Moments
from layershare.sharing.search import Change
from layershare.sharing.tie import fill
from layershare.tasks import Data, Task
from layershare.tasks.answers import output_change
from layershare.tasks.calibration import sample_batches


class Bench:
    """One model, what is known of it, and the measure.

    change: how far another model's answers are from those of ``model``, in the mean. batches: what the factors of an
    embedding table are weighted by.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        moments: Moments,
        change: Change,
        batches: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.model, self.moments, self.batches = model, moments, batches
        self._change = change
        self.fitted = Fitted(model, moments)
        self._counts: dict[str, Tensor] = {}

    def share(self, plan: SharingPlan) -> PreTrainedModel:
        """What ``layershare.share(model, plan, calibration=..., fit="answer")`` gives, up to rounding."""
        student, layout = begin(self.model, plan, calibrated=True)
        original: Callable[[str], str] = in_original(self.model, plan)
        finish(student, layout, plan)
        for table in layout.tables:
            name = table.modules[0]
            if name not in self._counts and self.batches:
                self._counts[name] = count_tokens(self.model, table, self.batches)
            fill(student, solve_table(table, self.model.get_parameter, self._counts.get(name)))
        for job in layout.jobs:
            fill(student, self.fitted.values(job, original))
        return student

    def change(self, model: PreTrainedModel) -> float:
        """The mean change of an answer, to six digits: what several threads add up differs behind them."""
        moved = self._change(model)
        return float(f"{moved:.6g}") if math.isfinite(moved) else math.inf

    def __call__(self, plan: SharingPlan) -> float:
        return self.change(self.share(plan))


def bench_of(
    kind: Task, model: Any, tokenizer: Any, data: Data, moments: Callable[[list[dict[str, Any]]], Moments]
) -> Bench:
    """The bench of ``model`` on the data of a run: ``moments`` measures on texts to train on, and texts of the
    validation split judge, or the same ones where there is none."""
    fit = judged = sample_batches(kind, tokenizer, data, model.config)
    if data.validation is not None and len(data.validation):
        judged = sample_batches(kind, tokenizer, replace(data, train=data.validation), model.config)
    return Bench(model, moments(fit), output_change(kind, model, judged), fit)
