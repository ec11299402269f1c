"""Ranks for many matrices within one budget, where each parameter saves most error. Pure.

The errors must be in one unit for all matrices, as those of :mod:`layershare.sharing.sensitivity` are. A matrix kept at
rank r costs ``costs[r - 1]`` parameters and leaves the error of its other singular values; kept whole it costs
``whole`` and leaves none. The least total error within the budget is found on its Lagrangian: for a price of error
``lam`` per parameter every matrix chooses by itself, and ``lam`` is bisected until the budget is met.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 100


class Spectrum(NamedTuple):
    """What ranks of one matrix are worth, and what they cost."""

    energies: Tensor
    """Squared singular values in the metric of the answer, descending, float64: what each further rank saves."""
    costs: Tensor
    """Stored parameters at rank 1, 2, ..., ascending, int64."""
    whole: int
    """Stored parameters of the matrix left as it is: rows * columns."""

    @property
    def useful(self) -> int:
        """The highest rank that stores less than the whole matrix; 0 if none does."""
        return int((self.costs[: len(self.energies)] < self.whole).sum())

    def cost(self, rank: int | None) -> int:
        return self.whole if rank is None else int(self.costs[rank - 1])


def allocate(spectra: Sequence[Spectrum], budget: int) -> list[int | None]:
    """The rank of each matrix, None where it stays whole, so that at most ``budget`` parameters are stored.

    Every factorised matrix keeps a rank of at least 1. Raises ValueError, with the least budget, if even that is too
    much.
    """
    least = [1 if one.useful else None for one in spectra]
    if _cost(spectra, least) > budget:
        raise ValueError(f"{_cost(spectra, least)} parameters are the least")
    if sum(one.whole for one in spectra) <= budget:
        return [None] * len(spectra)
    errors = [_errors(one) for one in spectra]
    low, high = 0.0, max(float(one.energies.sum()) for one in spectra) + 1.0
    best = least
    for _ in range(STEPS):
        middle = (low + high) / 2
        ranks = [_choice(one, error, middle) for one, error in zip(spectra, errors, strict=True)]
        fits = _cost(spectra, ranks) <= budget
        best, low, high = (ranks, low, middle) if fits else (best, middle, high)
    return _spend(spectra, best, budget)


def left(spectrum: Spectrum, rank: int | None) -> float:
    """The error that remains at ``rank``."""
    return 0.0 if rank is None else float(spectrum.energies[rank:].sum())


def _errors(one: Spectrum) -> Tensor:
    """What remains at each useful rank."""
    beyond = one.energies.flip(0).cumsum(0).flip(0)
    return torch.cat([beyond[1:], beyond.new_zeros(1)])[: one.useful]


def _choice(one: Spectrum, errors: Tensor, lam: float) -> int | None:
    if not len(errors):
        return None
    sums = errors + lam * one.costs[: len(errors)]
    rank = int(sums.argmin())
    return None if float(sums[rank]) >= lam * one.whole else rank + 1


def _cost(spectra: Sequence[Spectrum], ranks: Sequence[int | None]) -> int:
    return sum(one.cost(rank) for one, rank in zip(spectra, ranks, strict=True))


def _spend(spectra: Sequence[Spectrum], ranks: list[int | None], budget: int) -> list[int | None]:
    """What the bisection left over, one rank after another, on the one that saves most for its price."""
    ranks, rest = list(ranks), budget - _cost(spectra, ranks)

    def offer(i: int) -> tuple[float, int, int] | None:
        one, rank = spectra[i], ranks[i]
        if rank is None or rank >= one.useful or (price := one.cost(rank + 1) - one.cost(rank)) > rest:
            return None
        return float(one.energies[rank]) / price, price, i

    while offers := [made for made in map(offer, range(len(spectra))) if made]:
        _, price, best = max(offers)
        ranks[best], rest = (ranks[best] or 0) + 1, rest - price
    return ranks
