"""All that trials need, from files: the model, texts to fit on, other texts to judge by. Alike in every process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layershare import stages
from layershare.errors import OptionError
from layershare.search.bench import Bench, bench_of
from layershare.sharing.moments import measure
from layershare.store.open import load_model, load_processor
from layershare.tasks import Data, Task, get_task
from layershare.tasks.answers import answer_of

# What a model is for, by the end of the name of its class.
USES = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "Model": "sentence-embedding",
}


def task_for(config: Any) -> str:
    """The task that the class of a checkpoint is for. Raises OptionError where that does not tell."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    found = next((task for end, task in USES.items() if name.endswith(end)), None)
    if found is None or config.is_encoder_decoder:
        raise OptionError(
            f"a {name or config.model_type} may be for several tasks.", "Say which one with --task."
        )
    return found


@dataclass(frozen=True)
class Setting:
    """What a search is about; it can be sent to other processes."""

    folder: Path
    task: str
    task_settings: Mapping[str, Any]
    skip_bad: bool
    data: tuple[Path, ...]
    validation: tuple[Path, ...]
    columns: Mapping[str, str] | None
    budget: float
    """A fraction of the layer parameters below 1, or bytes of the whole model."""
    seed: int
    threads: int = 0

    @property
    def kind(self) -> Task:
        """The task as it is set."""
        return get_task(self.task, self.task_settings, skip_bad=self.skip_bad)

    def read(self) -> Data:
        """Train: what to fit on. Validation: what to judge by; without a file of its own, half of the texts."""
        split = (1.0, 0.0, 0.0) if self.validation else (0.5, 0.5, 0.0)
        return self.kind.read(
            list(self.data),
            validation=list(self.validation),
            columns=self.columns,
            split=split,
            seed=self.seed,
        )

    def inputs(self, data: Data) -> dict[str, Any]:
        """Everything that decides what is found, JSON-ready."""
        return {
            "model": stages.fingerprint(self.folder),
            "task": self.task,
            "setting of the task": dict(self.task_settings),
            "data": [stages.hash_of(file).hexdigest() for file in self.data],
            "validation": [stages.hash_of(file).hexdigest() for file in self.validation],
            "columns": dict(data.columns),
            "budget": self.budget,
            "seed": self.seed,
        }

    def bench(self, data: Data) -> Bench:
        """The model, measured on the texts to fit on, and how to judge."""
        if self.threads:
            torch.set_num_threads(self.threads)
        kind = self.kind
        model, tokenizer = (
            load_model(self.folder, kind.auto_class),
            load_processor(self.folder, kind.processor),
        )
        kind.check(data, model.config)
        return bench_of(
            kind, model, tokenizer, data,
            lambda batches: measure(model, batches, answer=answer_of(kind), seed=self.seed),
        )  # fmt: skip
