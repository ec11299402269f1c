"""What every side is given: the original, calibration texts, what was measured on them, and the judge."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import layershare
from layershare.sharing.moments import Moments, linear_maps
from layershare.sharing.sensitivity import sensitivities
from layershare.sharing.statistics import collect
from layershare.tasks.answers import answer_of, output_change

Batches = list[dict[str, Any]]


class Subject:
    """One model and how it is judged. Moments are measured once for each seed and kept in ``folder``."""

    title: str
    """Of its tables."""
    told: Sequence[str]
    """Lines under the title; ``{...}`` are figures of the original."""
    figures: dict[str, str]
    """Key of a row -> head of a column."""
    basis_shares: tuple[str, ...]
    """The parts that Basis Sharing shares between two layers, in the published configuration nearest to this model."""
    adapted: str
    """The linear maps that get LoRA factors, as a regular expression."""
    without: tuple[str, ...] = ()
    """Sides that do not run on this model."""
    length: int
    """Tokens of a text."""
    judged: str
    """Short hash of what models are judged on."""

    def __init__(self, teacher: Any, task: Any, tokenizer: Any, folder: Path) -> None:
        self.teacher, self.task, self.tokenizer, self.folder = teacher, task, tokenizer, folder
        self.stacks = layershare.find_stacks(teacher)
        self.whole = layershare.count(teacher).layer_unique
        self.seconds: dict[str, float] = {}

    def use(self, seed: int) -> None:
        """Take the calibration texts of this seed."""
        self.calibration = self.sample(seed)
        for name in ("inputs", "slopes"):
            self.__dict__.pop(name, None)

    def sample(self, seed: int) -> Batches:
        raise NotImplementedError

    def judge(self, model: Any) -> dict[str, float]:
        raise NotImplementedError

    def better(self, key: str) -> bool:
        """Whether more of this figure is better."""
        return True

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """E[x x^T] of every linear map: all that the peers know of the texts."""
        return self._kept(
            "inputs", lambda: collect(self.teacher, linear_maps(self.teacher), self.calibration)
        )

    @cached_property
    def slopes(self) -> dict[str, torch.Tensor]:
        """Moments of the answer's gradients."""
        return self._kept("slopes", self.measure_slopes)

    def measure_slopes(self) -> dict[str, torch.Tensor]:
        return sensitivities(
            self.teacher, linear_maps(self.teacher), self.calibration, answer=answer_of(self.task)
        )

    @property
    def moments(self) -> Moments:
        return Moments(self.inputs, self.slopes)

    def change(self, batches: Batches) -> Callable[[Any], float]:
        return output_change(self.task, self.teacher, batches)

    def _kept(self, what: str, measure: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        key = short_hash(batch[self.teacher.main_input_name].numpy().tobytes() for batch in self.calibration)
        file = self.folder / "moments" / f"{type(self).__name__.lower()}-{what}-{key}.pt"
        if file.exists():
            return torch.load(file, weights_only=True)
        started = time.process_time()
        found = measure()
        print(f"# {what} of {type(self).__name__}: {time.process_time() - started:.0f} s", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(found, part)
        part.rename(file)
        return found


def short_hash(parts: Iterable[bytes]) -> str:
    key = hashlib.sha256()
    for part in parts:
        key.update(part)
    return key.hexdigest()[:12]
