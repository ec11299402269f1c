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
    found, a new linear map.
    """

    def __init__(self, tail: Tail, width: int, classes: int, like: Tensor) -> None:
        super().__init__()
        steps = copy.deepcopy(tail.behind) or ((nn.Linear(width, classes), False),)
        self.steps = nn.ModuleList(module for module, _ in steps).to(like)
        self.picks = tuple(picks for _, picks in steps)

    def forward(self, pooled: Tensor) -> Tensor:
        return through(zip(self.steps, self.picks, strict=True), pooled)


def new_heads(model: Any, tail: Tail, positions: tuple[int, ...], seed: int = 0) -> nn.ModuleDict:
    """Untrained heads behind these positions, by their numbers as text. Always the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        like = next(model.parameters())
        made = {
            str(p): Head(tail, model.config.hidden_size, model.config.num_labels, like) for p in positions
        }
    for parameter in nn.ModuleDict(made).parameters():
        parameter.requires_grad_()
    return nn.ModuleDict(made)


def confidence(logits: Tensor) -> Tensor:
    """The probability of the likeliest class [B] of logits [B, classes]."""
    return logits.float().softmax(-1).amax(-1)


Thresholds = float | Mapping[int, float]
"""How sure an exit must be, one number for all or one for each position. Above 1 nothing leaves there."""


def threshold_at(thresholds: Thresholds, position: int) -> float:
    return thresholds[position] if isinstance(thresholds, Mapping) else thresholds
