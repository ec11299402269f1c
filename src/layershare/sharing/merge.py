"""Merges: the weights of several positions become one. Pure functions on tensors.

All take ``weights`` of one shape, (out, in), and return one of that shape and dtype, summed in float64 (the mean of
half-precision numbers: in float32).
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Numbers averaged at a time: they stay in the processor's cache, and no copy of a matrix is made. Torch uses several
# threads above this size, which would wait for each other at every step; ours wait once.
BLOCK = 2**15


TINY = torch.finfo(torch.float32).tiny


def first(weights: Sequence[Tensor]) -> Tensor:
    """The first position's weight (the "Lower"/"Stepwise" choice of Bae et al., 2024, 2410.20672)."""
    return weights[0].clone()


def last(weights: Sequence[Tensor]) -> Tensor:
    """The last position's weight."""
    return weights[-1].clone()


def mean(weights: Sequence[Tensor]) -> Tensor:
    """The average (Bae et al., 2024, 2410.20672: best below private low-rank corrections)."""
    merged = torch.empty(weights[0].shape, dtype=weights[0].dtype, device=weights[0].device)
    blocks = list(zip(*(tensor.reshape(-1).split(BLOCK) for tensor in (merged, *weights)), strict=True))
    workers = min(torch.get_num_threads(), len(blocks))
    if workers < 2:
        _average(blocks)
        return merged
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(_average, (blocks[first::workers] for first in range(workers))))
    return merged


@torch.no_grad()
def _average(blocks: Iterable[tuple[Tensor, ...]]) -> None:
    """Fill the first tensor of each tuple with the average of the others."""
    for block, one, *others in blocks:
        precise = torch.float32 if block.dtype in (torch.bfloat16, torch.float16) else torch.float64
        total = one.to(precise, copy=True)
        for other in others:
            total += other.to(precise)
        block.copy_(total.div_(1 + len(others)))


def regmean(weights: Sequence[Tensor], grams: Sequence[Tensor], ridge: float = 1e-4) -> Tensor:
    """Regression mean (Jin et al., 2022, 2212.09849): the M that minimises sum_l E|(W_l - M) x_l|^2.

    ``grams``: E[x x^T] of each position's inputs, (in, in). Closed form: M = (sum W_l G_l)(sum G_l)^-1.
    ``ridge`` pulls towards the plain mean in directions without activations, in units of the mean eigenvalue.
    """
    grams = [gram.double() for gram in grams]
    damped = [
        g + ridge * g.diagonal().mean().clamp_min(TINY) * torch.eye(len(g), dtype=g.dtype, device=g.device)
        for g in grams
    ]
    target = torch.stack([weight.double() @ g for weight, g in zip(weights, damped, strict=True)]).sum(0)
    return torch.linalg.solve(torch.stack(damped).sum(0), target, left=False).to(weights[0].dtype)
