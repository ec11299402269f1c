"""Ranks for many matrices within one budget, where each parameter saves most error. Pure.

The errors must be in one unit for all matrices, as those of :mod:`layershare.sharing.sensitivity` are. A matrix kept at
rank r costs ``r * price`` parameters and leaves the error of its other singular values; kept whole it costs ``whole``
and leaves none. The least total error within the budget is found on its Lagrangian: for a price of error ``lam`` per
parameter every matrix chooses by itself, and ``lam`` is bisected until the budget is met.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

STEPS = 100


class Spectrum(NamedTuple):
    """What ranks of one matrix are worth."""

    energies: Tensor
    """Squared singular values in the metric of the answer, descending, float64: what each further rank saves."""
    price: int
    """Stored parameters a rank: rows + columns."""
    whole: int
    """Stored parameters of the matrix left as it is: rows * columns."""


def allocate(spectra: Sequence[Spectrum], budget: int) -> list[int | None]:
    """The rank of each matrix, None where it stays whole, so that at most ``budget`` parameters are stored.

    Every factorised matrix keeps a rank of at least 1. Raises ValueError, with the least budget, if even that is too
    much.
    """
    least = [None if one.price >= one.whole else 1 for one in spectra]
    if _cost(spectra, least) > budget:
        raise ValueError(f"{_cost(spectra, least)} parameters are the least")
    if sum(one.whole for one in spectra) <= budget:
        return [None] * len(spectra)
    low, high = 0.0, max(float(one.energies.sum()) for one in spectra) + 1.0
    best = least
    for _ in range(STEPS):
        middle = (low + high) / 2
        ranks = [_choice(one, middle) for one in spectra]
        fits = _cost(spectra, ranks) <= budget
        best, low, high = (ranks, low, middle) if fits else (best, middle, high)
    return _spend(spectra, best, budget)


def left(spectrum: Spectrum, rank: int | None) -> float:
    """The error that remains at ``rank``."""
    return 0.0 if rank is None else float(spectrum.energies[rank:].sum())


def _choice(one: Spectrum, lam: float) -> int | None:
    rank = max(1, int((one.energies > lam * one.price).sum()))
    if one.price >= one.whole or left(one, rank) + lam * rank * one.price >= lam * one.whole:
        return None
    return rank


def _cost(spectra: Sequence[Spectrum], ranks: Sequence[int | None]) -> int:
    return sum(
        one.whole if rank is None else rank * one.price for one, rank in zip(spectra, ranks, strict=True)
    )


def _spend(spectra: Sequence[Spectrum], ranks: list[int | None], budget: int) -> list[int | None]:
    """What the bisection left over, on the ranks that save most for their price."""
    ranks, rest = list(ranks), budget - _cost(spectra, ranks)
    offers = sorted(
        ((float(one.energies[rank + i]) / one.price, j)
         for j, (one, rank) in enumerate(zip(spectra, ranks, strict=True)) if rank is not None
         for i in range(min(len(one.energies) - rank, rest // one.price))),
        key=lambda offer: -offer[0],
    )  # fmt: skip
    for _, j in offers:
        if (
            (rank := ranks[j]) is not None
            and spectra[j].price <= rest
            and (rank + 1) * spectra[j].price < spectra[j].whole
        ):
            ranks[j], rest = rank + 1, rest - spectra[j].price
    return ranks
