"""Low-rank factors in the metric of the activations. Pure functions on tensors.

A linear map W (out, in) is approximated where its inputs x are: the error is E|(W - W') x|^2 = |(W - W') S|_F^2 with
S S^T = E[x x^T] = G (SVD-LLM: Wang et al., 2024, 2403.07378). Without a Gram matrix, S is the identity and the error
is that of the weights. Factors come back balanced: ``up`` (out, rank) and ``down`` (rank, in) have entries of equal
root mean square, since the optimizer moves all entries alike; others heal worse (docs/log.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def root(gram: Tensor, ridge: float = 1e-6) -> Factors:
    """S and its inverse, both (in, in), symmetric, with S S = G. ``ridge`` damps directions without activations."""
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp_min(ridge * values[-1].clamp_min(torch.finfo(torch.float32).tiny))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def truncate(weight: Tensor, rank: int, gram: Tensor | None = None) -> Factors:
    """The best ``up`` (out, rank), ``down`` (rank, in) of one matrix: Eckart-Young in the metric of G."""
    ups, down = shared_input([weight], rank, None if gram is None else [gram])
    return ups[0], down


def shared_input(
    weights: Sequence[Tensor], rank: int, grams: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Basis Sharing (Wang et al., 2024, 2410.03765): W_l = up_l @ down with one ``down`` (rank, in) for all positions.

    One whitening for the group, from the sum of the Gram matrices. Returns the private ``up_l`` (out, rank) and
    ``down``.
    """
    stacked = torch.cat([weight.double() for weight in weights])
    root_, inverse = (
        _identity(stacked) if grams is None else root(torch.stack([g.double() for g in grams]).sum(0))
    )
    u, s, vh = torch.linalg.svd(stacked @ root_, full_matrices=False)
    scale = _halves(s[:rank])
    up, down = _balanced(u[:, :rank] * (s[:rank] / scale), (scale[:, None] * vh[:rank]) @ inverse)
    ups = up.split([len(weight) for weight in weights])
    return [up.to(weights[0].dtype) for up in ups], down.to(weights[0].dtype)


def shared_output(
    weights: Sequence[Tensor], rank: int, grams: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """One ``up`` (out, rank) for all positions, W_l = up @ down_l; each position is whitened by its own Gram matrix.

    Returns ``up`` and the private ``down_l`` (rank, in): the projections on the best common output space.
    """
    dense = [weight.double() for weight in weights]
    seen = dense if grams is None else [w @ root(g)[0] for w, g in zip(dense, grams, strict=True)]
    u, s, _ = torch.linalg.svd(torch.cat(seen, dim=1), full_matrices=False)
    scale = _halves(s[:rank])
    own = torch.cat([u[:, :rank].T @ w for w in dense], dim=1) / scale[:, None]
    up, down = _balanced(u[:, :rank] * scale, own)
    downs = down.split([w.shape[1] for w in dense], dim=1)
    return up.to(weights[0].dtype), [down.to(weights[0].dtype) for down in downs]


def _halves(singular: Tensor) -> Tensor:
    """The part of each singular value that one factor takes; 1 where it is 0, so that this factor can still learn."""
    return torch.where(singular > 0, singular.sqrt(), torch.ones_like(singular))


def _balanced(up: Tensor, down: Tensor) -> Factors:
    """The same product, with entries of equal root mean square in both factors."""
    sizes = [factor.square().mean().sqrt() for factor in (up, down)]
    if min(sizes) == 0:  # nothing to approximate: one factor is 0 and the other one ready to learn
        return up, down
    ratio = (sizes[1] / sizes[0]).sqrt()
    return up * ratio, down / ratio


def _identity(like: Tensor) -> Factors:
    eye = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return eye, eye
