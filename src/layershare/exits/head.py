"""One exit: the model's own head, copied, on the states behind an earlier layer; or a linear map on them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layershare.exits.tail import Tail, through


class Head(nn.Module):
    """From pooled states [B, d] to logits [B, classes].

    A copy of what the model has behind its pooling, with the model's values to begin with; where that could not be
    found, a new linear map. ``pooling`` is how the states that it reads are pooled: earlier layers may have spread over
    all tokens what the last one gathers in one.
    """

    def __init__(self, tail: Tail, pooling: str, width: int, classes: int, like: Tensor) -> None:
        super().__init__()
        self.pooling = pooling
        steps = copy.deepcopy(tail.behind) or ((nn.Linear(width, classes), False),)
        self.steps = nn.ModuleList(module for module, _ in steps).to(like)
        self.picks = tuple(picks for _, picks in steps)

    def forward(self, pooled: Tensor) -> Tensor:
        return through(zip(self.steps, self.picks, strict=True), pooled)


def new_heads(model: Any, tail: Tail, poolings: Mapping[int, str], seed: int = 0) -> nn.ModuleDict:
    """Untrained heads, position -> pooling, by their positions as text. Always the same for a seed."""
    width, classes, like = model.config.hidden_size, model.config.num_labels, next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = {
            str(position): Head(tail, pooling, width, classes, like) for position, pooling in poolings.items()
        }
    for parameter in (made := nn.ModuleDict(heads)).parameters():
        parameter.requires_grad_()
    return made.eval()


def confidence(logits: Tensor) -> Tensor:
    """The probability of the likeliest class [B] of logits [B, classes]."""
    return logits.float().softmax(-1).amax(-1)


Thresholds = float | Mapping[int, float]
"""How sure an exit must be, one number for all or one for each position. Above 1 nothing leaves there."""


def threshold_at(thresholds: Thresholds, position: int) -> float:
    return thresholds[position] if isinstance(thresholds, Mapping) else thresholds
