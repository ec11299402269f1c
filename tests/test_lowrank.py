"""Low-rank factors: optimal against other solvers and against chance."""

from itertools import pairwise

import pytest
import torch

from layershare.sharing.lowrank import (
    _conjugate,
    _sylvester,
    _together,
    fit_down,
    fit_up,
    geopair,
    root,
    shared_input,
    shared_output,
    truncate,
    with_diagonal,
)


def gram_of(size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    inputs = torch.randn(40, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return inputs.T @ inputs / 40 * scale


def weights_of(count: int, out: int = 7, size: int = 6) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randn(out, size, generator=draw, dtype=torch.float64) for _ in range(count)]


def error(weight: torch.Tensor, made: torch.Tensor, gram: torch.Tensor) -> float:
    """E|(W - W') x|^2."""
    rest = weight - made
    return torch.einsum("oi,ij,oj->", rest, gram, rest).item()


def test_root_is_a_root():
    gram = gram_of(6, 0)
    half = root(gram)
    torch.testing.assert_close(half @ half.T, gram, rtol=2e-6, atol=0)
    assert torch.equal(half, half.tril())


@pytest.mark.parametrize("last", [0.0, -1e-5])  # nobody goes there; single precision says less than nobody
def test_root_is_regular_where_there_are_no_activations(last):
    for gram in (torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 1.0, 0.0, last]))):
        half = root(gram)
        assert half.isfinite().all()
        assert half.diagonal().min() > 0


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_reaches_the_bound_of_eckart_and_young(rank):
    (weight,), gram = weights_of(1), gram_of(6, 1)
    up, down = truncate(weight, rank, gram)
    assert (up.shape, down.shape) == ((7, rank), (rank, 6))
    singular = torch.linalg.svdvals(
        weight @ torch.linalg.cholesky(gram)
    )  # any root of G gives the same values
    assert error(weight, up @ down, gram) == pytest.approx(singular[rank:].square().sum().item(), rel=1e-6)


def test_without_activations_the_weights_decide():
    (weight,) = weights_of(1)
    up, down = truncate(weight, 2)
    singular = torch.linalg.svdvals(weight)
    assert (weight - up @ down).square().sum().item() == pytest.approx(singular[2:].square().sum().item())


def test_no_step_in_any_direction_makes_the_truncation_better():
    (weight,), gram = weights_of(1), gram_of(6, 2)
    up, down = truncate(weight, 2, gram)
    best, draw = error(weight, up @ down, gram), torch.Generator().manual_seed(3)
    for step in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            other = up + step * torch.randn(up.shape, generator=draw, dtype=up.dtype)
            third = down + step * torch.randn(down.shape, generator=draw, dtype=up.dtype)
            assert error(weight, other @ third, gram) > best


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_factors_are_balanced_whatever_the_scale_of_the_inputs(scale):
    weights = weights_of(2)
    grams = [gram_of(6, seed) * scale for seed in range(2)]
    ups, down = shared_input(weights, 3, grams)
    torch.testing.assert_close(torch.cat(ups).square().mean(), down.square().mean())
    up, downs = shared_output(weights, 3, grams)
    torch.testing.assert_close(up.square().mean(), torch.cat(downs, dim=1).square().mean())


def test_a_residual_of_zero_leaves_one_factor_that_can_learn():
    up, down = truncate(torch.zeros(7, 6), 3, gram_of(6, 0))
    assert float(up.abs().max()) == 0
    assert float(down.abs().max(dim=1).values.min()) > 0


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("make", [shared_input, shared_output])
def test_full_rank_is_exact(make, seen):
    weights, grams = weights_of(2), [gram_of(6, i) for i in range(2)] if seen else None
    if make is shared_input:
        ups, down = make(weights, 6, grams)
        made = [up @ down for up in ups]
    else:
        up, downs = make(weights, 7, grams)
        made = [up @ down for down in downs]
    torch.testing.assert_close(made, weights)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_shared_input_is_as_good_as_alternating_least_squares(rank):
    weights, gram = weights_of(3), gram_of(6, 4)
    ups, down = shared_input(weights, rank, [gram] * 3)
    found = sum(error(w, up @ down, gram) for w, up in zip(weights, ups, strict=True))
    best = min(alternate_input(weights, gram, rank, seed) for seed in range(4))
    assert found == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_shared_output_is_as_good_as_alternating_least_squares(rank):
    weights, grams = weights_of(3), [gram_of(6, i, 3.0**i) for i in range(3)]
    up, downs = shared_output(weights, rank, grams)
    found = sum(error(w, up @ d, g) for w, d, g in zip(weights, downs, grams, strict=True))
    best = min(alternate_output(weights, grams, rank, seed) for seed in range(4))
    assert found == pytest.approx(best, rel=1e-4)


def test_shared_input_is_whitened_by_what_all_positions_see():
    weights, grams = weights_of(2), [gram_of(6, 5), gram_of(6, 6, 9.0)]
    _, down = shared_input(weights, 2, grams)
    _, same = shared_input(weights, 2, [grams[0] + grams[1], torch.zeros(6, 6)])
    torch.testing.assert_close(down, same)
    assert not torch.allclose(down, shared_input(weights, 2, [grams[0]] * 2)[1], rtol=1e-2)


def test_a_rank_one_group_of_zeros_is_finite():
    up, downs = shared_output([torch.zeros(4, 3)] * 2, 2)
    assert up.isfinite().all()
    assert all((up @ down == 0).all() for down in downs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype):
    weights = [weight.to(dtype) for weight in weights_of(2)]
    (one, two), down = shared_input(weights, 2)
    up, downs = shared_output(weights, 2)
    assert {t.dtype for t in (one, two, down, up, *downs)} == {dtype}


def alternate_input(weights, gram, rank, seed) -> float:
    """min over up_l, down of sum_l |(W_l - up_l down) S|^2, by alternating from a random start."""
    half = torch.linalg.cholesky(gram)
    stacked = torch.cat(weights) @ half
    down = torch.randn(rank, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for _ in range(400):
        up = torch.linalg.lstsq(down.T, stacked.T).solution.T
        down = torch.linalg.lstsq(up, stacked).solution
    return (stacked - up @ down).square().sum().item()


def alternate_output(weights, grams, rank, seed) -> float:
    """min over up, down_l of sum_l |(W_l - up down_l) S_l|^2, by alternating from a random start."""
    seen = torch.cat([w @ torch.linalg.cholesky(g) for w, g in zip(weights, grams, strict=True)], dim=1)
    up = torch.randn(7, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for _ in range(400):
        down = torch.linalg.lstsq(up, seen).solution
        up = torch.linalg.lstsq(down.T, seen.T).solution.T
    return (seen - up @ down).square().sum().item()


def total(weights, ups, down, grams) -> float:
    return sum(error(w, up @ down, g) for w, up, g in zip(weights, ups, grams, strict=True))


@pytest.mark.parametrize("count", [2, 3])
def test_geopair_never_gets_worse_with_more_rounds_and_beats_one_metric_for_all(count):
    weights, grams = weights_of(count), [gram_of(6, i, 5.0**i) for i in range(count)]
    errors = [total(weights, *geopair(weights, 2, grams, rounds), grams) for rounds in range(12)]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < 0.98 * total(weights, *shared_input(weights, 2, grams), grams)


@pytest.mark.parametrize("count", [2, 3])
def test_geopair_reaches_the_optimum_of_a_gradient_solver(count):
    weights, grams = weights_of(count), [gram_of(6, i, 5.0**i) for i in range(count)]
    found = total(weights, *geopair(weights, 2, grams, 200), grams)
    assert found <= min(descend(weights, grams, 2, seed) for seed in range(4)) * 1.02


def test_geopair_is_basis_sharing_where_all_see_the_same():
    weights, gram = weights_of(2), gram_of(6, 4)
    one, two = (total(weights, *made, [gram] * 2) for made in (
        geopair(weights, 3, [gram] * 2), shared_input(weights, 3, [gram] * 2)))  # fmt: skip
    assert one == pytest.approx(two, rel=1e-4)


def test_geopair_takes_moments_of_fewer_tokens_than_features():
    """As they are added up in float32: not positive any more."""
    torch.manual_seed(0)
    grams = []
    for _ in range(2):
        tokens = torch.randn(4, 6, dtype=torch.float64)
        gram = tokens.T @ tokens / 4
        grams.append(gram - 1e-4 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64))
    assert min(float(torch.linalg.eigvalsh(gram)[0]) for gram in grams) < 0
    weights = weights_of(2)
    ups, down = geopair(weights, 6, grams)
    for weight, up, gram in zip(weights, ups, grams, strict=True):
        assert ((weight - up @ down).double() @ gram).abs().max() < 1e-2 * (
            weight.double() @ gram
        ).abs().max()


def test_geopair_of_full_rank_is_exact():
    weights = weights_of(2)
    ups, down = geopair(weights, 6, [gram_of(6, i) for i in range(2)])
    torch.testing.assert_close([up @ down for up in ups], weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solve", ["pair", "many"])
def test_the_equation_of_the_shared_factor_is_solved(solve):
    """Against its Kronecker form: vec(A X B) = (A kron B^T) vec(X), rows first."""
    left, right = [gram_of(3, i) for i in range(2)], [gram_of(6, 5 + i) for i in range(2)]
    wanted = torch.randn(3, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    matrix = sum(torch.kron(a, b.T.contiguous()) for a, b in zip(left, right, strict=True))
    exact = torch.linalg.solve(matrix, wanted.flatten()).view(3, 6)
    start = torch.zeros_like(wanted)
    found = (
        _sylvester(left, _together(*right), wanted)
        if solve == "pair"
        else _conjugate(left, right, wanted, start)
    )
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=1e-6)


def test_one_factor_given_the_other_one_is_least_squares():
    (weight,), x = (
        weights_of(1),
        torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    other = torch.randn(7, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    up, down = other, other[:6].T
    wanted = torch.linalg.lstsq(x @ down.T, x @ weight.T).solution.T
    torch.testing.assert_close(fit_up(weight, down, x.T @ x / 50), wanted)
    torch.testing.assert_close(fit_down(weight, up), torch.linalg.lstsq(up, weight).solution)


def descend(weights, grams, rank, seed) -> float:
    """min over up_l, down of sum_l E|(W_l - up_l down) x_l|^2, by L-BFGS from a random start."""
    draw = torch.Generator().manual_seed(seed)
    factors = [torch.randn(7, rank, generator=draw, dtype=torch.float64) for _ in weights]
    factors = [
        one.requires_grad_() for one in (*factors, torch.randn(rank, 6, generator=draw, dtype=torch.float64))
    ]
    optimizer = torch.optim.LBFGS(factors, max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        *ups, down = factors
        rest = [w - up @ down for w, up in zip(weights, ups, strict=True)]
        value = sum(torch.einsum("oi,ij,oj->", r, g, r) for r, g in zip(rest, grams, strict=True))
        value.backward()
        return value

    optimizer.step(closure)
    return float(closure().detach())


@pytest.mark.parametrize("shape", [(7, 6), (5, 6)])
def test_a_diagonal_takes_what_low_rank_cannot(shape):
    draw, gram = torch.Generator().manual_seed(0), gram_of(6, 1)
    low = (
        torch.randn(shape[0], 1, generator=draw, dtype=torch.float64)
        @ torch.randn(1, 6, generator=draw).double()
    )
    weight = low + 3 * torch.eye(*shape, dtype=torch.float64)
    errors = []
    for rounds in range(1, 30):
        up, down, diagonal = with_diagonal(weight, 1, gram, rounds)
        made = up @ down + torch.diag(diagonal) @ torch.eye(min(shape), 6).double() if shape[0] < 6 else None
        made = up @ down + torch.eye(*shape).double() @ torch.diag(diagonal) if made is None else made
        errors.append(error(weight, made, gram))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    plain = truncate(weight, 1, gram)
    assert errors[-1] < 0.2 * error(weight, plain[0] @ plain[1], gram)


def test_the_diagonal_is_where_the_gradient_vanishes():
    (weight,), gram = weights_of(1), gram_of(6, 1)
    up, down, diagonal = with_diagonal(weight, 2, gram, 300)

    def loss(values):
        return error(weight, up @ down + torch.eye(7, 6).double() @ torch.diag(values), gram)

    for i in range(6):
        step = torch.zeros(6, dtype=torch.float64).index_fill(0, torch.tensor(i), 1e-4)
        assert abs(loss(diagonal + step) - loss(diagonal - step)) / 2e-4 < 1e-3
