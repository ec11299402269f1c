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


def root(gram: Tensor, ridge: float = 1e-6) -> Tensor:
    """S (in, in), lower triangular, with S S^T = G (Cholesky), each feature's own share of G raised by ``ridge``: what
    is rare beside what is frequent stays what it is, and sums in single precision become positive.

    Any other root gives the same factors; that of the eigenvalues takes some fifteen times as long."""
    gram = gram.double()
    own = gram.diagonal().clamp_min(1e-6 * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    while True:
        half, failed = torch.linalg.cholesky_ex(gram + torch.diag(ridge * own))
        if not failed or not gram.isfinite().all():
            return half
        ridge = max(10 * ridge, 1e-12)


def truncate(weight: Tensor, rank: int, gram: Tensor | None = None, slope: Tensor | None = None) -> Factors:
    """The best ``up`` (out, rank), ``down`` (rank, in) of one matrix: Eckart-Young in the metric of G and ``slope``."""
    ups, down = shared_input(
        [weight], rank, None if gram is None else [gram], None if slope is None else [slope]
    )
    return ups[0], down


def shared_input(
    weights: Sequence[Tensor], rank: int, grams: Sequence[Tensor] | None = None, slopes: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Basis Sharing (Wang et al., 2024, 2410.03765): W_l = up_l @ down with one ``down`` (rank, in) for all positions.

    One whitening for the group, from the sum of the Gram matrices. ``slopes``: the moments of the answer's gradients at
    the outputs, (out, out), see :mod:`~layershare.sharing.sensitivity`; each position is then fitted to the answer.
    Returns the private ``up_l`` (out, rank) and ``down``.
    """
    views = _views(slopes, len(weights))
    stacked = torch.cat([_forth(view, weight.double()) for view, weight in zip(views, weights, strict=True)])
    half = None if grams is None else root(torch.stack([g.double() for g in grams]).sum(0))
    u, s, vh = torch.linalg.svd(stacked if half is None else stacked @ half, full_matrices=False)
    scale = _halves(s[:rank])
    pieces = (u[:, :rank] * (s[:rank] / scale)).split([len(weight) for weight in weights])
    ups = torch.cat([_back(view, piece) for view, piece in zip(views, pieces, strict=True)])
    up, down = balanced(ups, scale[:, None] * unwhitened(vh[:rank], half))
    private = up.split([len(weight) for weight in weights])
    return [up.to(weights[0].dtype) for up in private], down.to(weights[0].dtype)


def shared_output(
    weights: Sequence[Tensor], rank: int, grams: Sequence[Tensor] | None = None, slopes: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """One ``up`` (out, rank) for all positions, W_l = up @ down_l; each position is whitened by its own Gram matrix.

    ``slopes``: as for ``shared_input``; one metric for the group, from their sum.
    Returns ``up`` and the private ``down_l`` (rank, in): the projections on the best common output space.
    """
    (view,) = _views(slopes and [torch.stack([s.double() for s in slopes]).sum(0)], 1)
    dense = [_forth(view, weight.double()) for weight in weights]
    seen = dense if grams is None else [w @ root(g) for w, g in zip(dense, grams, strict=True)]
    u, s, _ = torch.linalg.svd(torch.cat(seen, dim=1), full_matrices=False)
    scale = _halves(s[:rank])
    own = torch.cat([u[:, :rank].T @ w for w in dense], dim=1) / scale[:, None]
    up, down = balanced(_back(view, u[:, :rank] * scale), own)
    downs = down.split([w.shape[1] for w in weights], dim=1)
    return up.to(weights[0].dtype), [down.to(weights[0].dtype) for down in downs]


def with_diagonal(
    weight: Tensor, rank: int, gram: Tensor | None = None, rounds: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """W ~ up @ down + D with a diagonal D, (min(out, in)): the correction of ResidualTransformer (Wang, Li, 2023,
    2310.02489). In turn, each exactly: ``truncate`` of W - D, and D of the rest R, d_i = (R G)_ii / G_ii.
    """
    dense = weight.double()
    metric = (
        torch.eye(dense.shape[1], dtype=dense.dtype, device=dense.device) if gram is None else gram.double()
    )
    side = min(dense.shape)
    diagonal = dense.new_zeros(side)
    for _ in range(rounds):
        up, down = truncate(dense - _on_diagonal(diagonal, dense), rank, gram)
        rest = dense - up @ down
        diagonal = (rest @ metric).diagonal()[:side] / metric.diagonal()[:side].clamp_min(1e-12)
    up, down = truncate(dense - _on_diagonal(diagonal, dense), rank, gram)
    return up.to(weight.dtype), down.to(weight.dtype), diagonal.to(weight.dtype)


def _on_diagonal(values: Tensor, like: Tensor) -> Tensor:
    return torch.diagonal_scatter(torch.zeros_like(like), values)


def geopair(
    weights: Sequence[Tensor], rank: int, grams: Sequence[Tensor] | None = None, rounds: int = 20
) -> tuple[list[Tensor], Tensor]:
    """As ``shared_input``, but each position keeps its own metric: min sum_l E|(W_l - up_l @ down) x_l|^2.

    (GeoPair, MWS AI, 2026.) No closed form: from the common whitening on, ``up_l`` and ``down`` are solved for in
    turn, each exactly, so that the error never grows. ``down`` solves sum_l A_l X G_l = B with A_l = up_l^T up_l: for
    a pair a Sylvester equation, diagonal in the generalised eigenvectors of (A_1, A_2) and (G_1, G_2); for more
    positions by conjugate gradients. One position, or no ``grams``: ``shared_input`` is exact already.
    """
    ups, down = shared_input(weights, rank, grams)
    if grams is None or len(weights) == 1:
        return ups, down
    dense = [weight.double() for weight in weights]
    metric = [_positive(gram.double()) for gram in grams]
    right = down.double()
    axes = _together(*metric) if len(dense) == 2 else None  # the costly part, once
    for _ in range(rounds):
        left = [fit_up(w, right, g) for w, g in zip(dense, metric, strict=True)]
        inner = [_damped(up.T @ up, 1e-10) for up in left]
        wanted = torch.stack([up.T @ w @ g for up, w, g in zip(left, dense, metric, strict=True)]).sum(0)
        right = (
            _sylvester(inner, axes, wanted) if axes is not None else _conjugate(inner, metric, wanted, right)
        )
    left = [fit_up(w, right, g) for w, g in zip(dense, metric, strict=True)]
    up, right = balanced(torch.cat(left), right)
    split = up.split([len(weight) for weight in weights])
    return [one.to(weights[0].dtype) for one in split], right.to(weights[0].dtype)


def atoms(
    weights: Sequence[Tensor], count: int, grams: Sequence[Tensor] | None = None, slopes: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """W_l = sum_s mix_ls A_s with ``count`` matrices A_s for all positions (MASA, "matrix atoms": 2508.04581, 2025).

    The best ones are the leading singular directions of the stacked matrices, each matrix one row, in one metric for
    the group: that of the mean of ``grams`` (in, in), and of the mean of ``slopes`` (out, out), see ``shared_input``;
    without them the weights' own. Mixes and atoms follow from the eigenvectors U of K_ij = tr(T W_i G W_j^T) alone:
    mix_ls = U_ls and A_s = sum_l U_ls W_l, so no matrix is taken apart. As many atoms as positions are exact.
    Returns the atoms (count, out, in) and for each position its mix (count).
    """
    dense = torch.stack([weight.double() for weight in weights])
    seen = dense if grams is None else dense @ torch.stack([gram.double() for gram in grams]).mean(0)
    if slopes:
        seen = torch.stack([slope.double() for slope in slopes]).mean(0) @ seen
    likeness = torch.einsum("ioj,koj->ik", seen, dense)
    _, vectors = torch.linalg.eigh((likeness + likeness.T) / 2)
    mixes = vectors.flip(1)[:, :count]  # the largest first
    made = torch.einsum("ls,loi->soi", mixes, dense)
    if (lacking := count - mixes.shape[1]) > 0:
        mixes = torch.cat([mixes, mixes.new_zeros(len(mixes), lacking)], dim=1)
        made = torch.cat([made, made.new_zeros(lacking, *made.shape[1:])])
    return made.to(weights[0].dtype), list(mixes.to(weights[0].dtype))


def fit_mix(weight: Tensor, atoms: Tensor, gram: Tensor) -> Tensor:
    """The mix (count) that minimises E|(W - sum_s mix_s A_s) x|^2 for given ``atoms`` (count, out, in)."""
    dense = atoms.double()
    seen = dense @ gram.double()
    inner = torch.einsum("soi,toi->st", seen, dense)
    return torch.linalg.solve(_damped(inner, 1e-10), torch.einsum("soi,oi->s", seen, weight.double())).to(
        weight.dtype
    )


def fit_up(weight: Tensor, down: Tensor, gram: Tensor) -> Tensor:
    """The ``up`` (out, rank) that minimises E|(W - up @ down) x|^2 for a given ``down`` (rank, in)."""
    weight_, down_, gram_ = weight.double(), down.double(), gram.double()
    seen = down_ @ gram_
    inner = _damped(seen @ down_.T, 1e-10)
    return torch.linalg.solve(inner, weight_ @ seen.T, left=False).to(weight.dtype)


def fit_down(weight: Tensor, up: Tensor, slope: Tensor | None = None) -> Tensor:
    """The ``down`` (rank, in) that minimises E|(W - up @ down) x|^2 for a given ``up`` (out, rank), whatever x is.

    ``slope``: of the answer at the output, as in ``shared_input``."""
    (view,) = _views(None if slope is None else [slope], 1)
    seen = (_forth(view, one.double()) for one in (up, weight))
    return torch.linalg.lstsq(*seen, driver="gelsd").solution.to(weight.dtype)


def effective_rank(weights: Sequence[Tensor], grams: Sequence[Tensor] | None = None) -> float:
    """The exponential of the entropy of the singular values of [W_1; ...; W_n] S (Roy, Vetterli, 2007; D-Rank, 2025).

    Between 1 and the smaller side; S as in ``shared_input``. Small: few directions carry all.
    """
    stacked = torch.cat([weight.double() for weight in weights])
    seen = stacked if grams is None else stacked @ root(torch.stack([g.double() for g in grams]).sum(0))
    share = torch.linalg.svdvals(seen)
    share = share[share > 0] / share.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float((-(share * share.log()).sum()).exp())


def _damped(square: Tensor, ridge: float = 1e-6) -> Tensor:
    """``square`` plus a little of the identity, in units of its mean eigenvalue: never singular."""
    size = ridge * square.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return square + size * torch.eye(len(square), dtype=square.dtype, device=square.device)


def _positive(gram: Tensor) -> Tensor:
    """Damped. Of fewer tokens than features rounding leaves negative eigenvalues too large for that, which go first."""
    damped = _damped(gram)
    if int(torch.linalg.cholesky_ex(damped).info):
        values, vectors = torch.linalg.eigh(gram)
        damped = _damped((vectors * values.clamp_min(0)) @ vectors.T)
    return damped


def _sylvester(left: Sequence[Tensor], axes: Factors, wanted: Tensor) -> Tensor:
    """X with A_1 X B_1 + A_2 X B_2 = C, for symmetric positive A and B; ``axes``: B_1 and B_2 together."""
    p, a = _together(*left)
    q, b = axes
    return p @ ((p.T @ wanted @ q) / (1 + a[:, None] * b)) @ q.T


def _together(one: Tensor, other: Tensor) -> Factors:
    """P and v with P^T one P = 1 and P^T other P = diag(v)."""
    inverse = torch.linalg.inv(torch.linalg.cholesky(one))
    values, vectors = torch.linalg.eigh(inverse @ other @ inverse.T)
    return inverse.T @ vectors, values.clamp_min(0)


def _conjugate(left: Sequence[Tensor], right: Sequence[Tensor], wanted: Tensor, start: Tensor) -> Tensor:
    """X with sum_l A_l X B_l = C by conjugate gradients from ``start``; each step lowers the error."""

    def apply(x: Tensor) -> Tensor:
        return torch.stack([a @ x @ b for a, b in zip(left, right, strict=True)]).sum(0)

    found, rest = start, wanted - apply(start)
    way, size = rest, rest.square().sum()
    for _ in range(50):
        if size <= 1e-20 * wanted.square().sum():
            break
        moved = apply(way)
        step = size / (way * moved).sum()
        found, rest = found + step * way, rest - step * moved
        size, old = rest.square().sum(), size
        way = rest + size / old * way
    return found


def _halves(singular: Tensor) -> Tensor:
    """The part of each singular value that one factor takes; 1 where it is 0, so that this factor can still learn."""
    return torch.where(singular > 0, singular.sqrt(), torch.ones_like(singular))


def balanced(up: Tensor, down: Tensor) -> Factors:
    """The same product, with entries of equal root mean square in both factors."""
    sizes = [factor.square().mean().sqrt() for factor in (up, down)]
    if min(sizes) == 0:  # nothing to approximate: one factor is 0 and the other one ready to learn
        return up, down
    ratio = (sizes[1] / sizes[0]).sqrt()
    return up * ratio, down / ratio


def pivoted(
    up: Tensor, down: Tensor, gram: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same product as ``up'`` (out, rank), ``down'`` (rank, in - rank) and ``order`` (in), int32, so that it is
    up' [1, down'] with its columns in ``order`` (PIFA: Zhao et al., 2025, 2501.19090, there of rows).

    The pivots are those of an LU factorisation with partial pivoting, of inputs by their size in ``gram`` (in, in):
    then what is rare is expressed by what is large, and no coefficient is large beside what it multiplies. ``order``:
    the one to take instead.
    """
    up_, down_ = up.double(), down.double()
    if order is None:
        size = torch.ones_like(down_[0]) if gram is None else gram.diagonal().double().clamp_min(1e-12).sqrt()
        packed, swaps = torch.linalg.lu_factor((down_ * size).T)
        order = torch.lu_unpack(packed, swaps, unpack_data=False)[0].argmax(0)
    order, rank = order.long(), len(down_)
    pivots, rest = down_[:, order[:rank]], down_[:, order[rank:]]
    return (
        (up_ @ pivots).to(up.dtype),
        torch.linalg.solve(pivots, rest).to(down.dtype),
        order.to(torch.int32),
    )


def rebalanced(up: Tensor, down: Tensor) -> Factors:
    """The same product from its singular values, which the factors share evenly, as :func:`truncate` leaves them."""
    (left, one), (right, other) = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(one @ other.T, full_matrices=False)
    scale = _halves(s)
    made = balanced(left @ u * (s / scale), scale[:, None] * vh @ right.T)
    return made[0].to(up.dtype), made[1].to(down.dtype)


def unwhitened(factor: Tensor, half: Tensor | None) -> Tensor:
    """``factor`` (rank, in) of W S as that of W; ``half``: S, lower triangular, None for the identity."""
    return factor if half is None else torch.linalg.solve_triangular(half, factor, upper=False, left=False)


def _views(slopes: Sequence[Tensor] | None, count: int) -> Sequence[Tensor | None]:
    """How each output is seen from the answer: the root of the slope; None: as it is."""
    return [root(slope) for slope in slopes] if slopes else [None] * count


def _forth(view: Tensor | None, outputs: Tensor) -> Tensor:
    return outputs if view is None else view.T @ outputs


def _back(view: Tensor | None, outputs: Tensor) -> Tensor:
    return unwhitened(outputs.T, view).T
