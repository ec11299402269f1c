"""Low-rank factors: optimal against other solvers and against chance."""

import pytest
import torch

from layershare.sharing.lowrank import root, shared_input, shared_output, truncate


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


def test_root_is_a_root_and_its_inverse():
    gram = gram_of(6, 0)
    half, inverse = root(gram)
    torch.testing.assert_close(half @ half, gram)
    torch.testing.assert_close(half @ inverse, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))])
def test_root_without_activations_is_finite(gram):
    assert all(part.isfinite().all() for part in root(gram))


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
    assert float(down.abs().min(dim=1).values.max()) > 0


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
