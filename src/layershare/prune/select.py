"""Which units go: pure functions from scores to masks. True means removed. Ties go to the first ones in order."""

import torch
from torch import Tensor

from layershare.errors import OptionError


def lowest(scores: Tensor, count: int) -> Tensor:
    """Exactly the ``count`` lowest of ``scores``, of any shape; a mask of that shape."""
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = flat.kthvalue(count).values
    chosen = flat < limit
    equal = torch.nonzero(flat == limit).flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.view(scores.shape)


def lowest_in_rows(scores: Tensor, count: int) -> Tensor:
    """The ``count`` lowest of each row of ``scores`` (rows, columns)."""
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def n_of_m(scores: Tensor, n: int, m: int, name: str = "the matrix") -> Tensor:
    """All but the ``n`` highest of every ``m`` neighbours in each row of ``scores`` (rows, columns).

    Raises OptionError if the columns do not divide by ``m``.
    """
    rows, columns = scores.shape
    if columns % m:
        raise OptionError(f"{name} has {columns} inputs, which does not divide by the {m} of {n}:{m}.")
    return lowest_in_rows(scores.reshape(-1, m), m - n).view(rows, columns)


def within_energy(energy: Tensor, threshold: float) -> Tensor:
    """The largest set of entries of ``energy`` (any shape, not negative) whose sum is at most ``threshold``.

    It is the longest run of the smallest entries: adding the next one, or exchanging any for another, would not make it
    larger. Sums are in float64.
    """
    values, order = energy.flatten().double().sort(stable=True)
    count = int((values.cumsum(0) <= threshold).sum())
    chosen = torch.zeros(energy.numel(), dtype=torch.bool, device=energy.device)
    chosen[order[:count]] = True
    return chosen.view(energy.shape)
