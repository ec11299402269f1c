"""Training adapters with the one training entry: what it sees are the trainable parameters, and nothing else."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import nn

from layershare.train import Collator, ComputeLoss, TrainConfig, train


class Trainable(nn.Module):
    """A PeftModel as :func:`layershare.train.train` gets it.

    It runs the whole model, but owns only its trainable parameters. So checkpoints and averages hold these alone, a
    resumed run is exact, and the frozen base is never written anywhere.
    """

    model: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not registered
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        self.model.train(mode)
        return super().train(mode)

    def _apply(self, function: Callable, recurse: bool = True) -> Self:
        self.model._apply(function, recurse)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._parameters[name.replace(".", "/")] = parameter
        return self


def fit(
    model: Any,
    dataset: Any,
    collator: Collator,
    compute_loss: ComputeLoss,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = True,
    quiet: bool = False,
    lengths: Sequence[int] | None = None,
    made_of: Mapping[str, str] | None = None,
) -> list[dict[str, float]]:
    """:func:`layershare.train.train` for a PeftModel: trains its adapters and head in place, exactly resumable."""
    return train(
        Trainable(model), dataset, collator, compute_loss, config, out, resume=resume, quiet=quiet, lengths=lengths,
        made_of=made_of,
    )  # fmt: skip
