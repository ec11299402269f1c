"""Merges against independent solvers."""

import numpy as np
import pytest
import torch

from layershare.sharing import merge


@pytest.fixture
def weights() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 4) for _ in range(3)]


def test_first_last_and_mean(weights):
    assert torch.equal(merge.first(weights), weights[0])
    assert torch.equal(merge.last(weights), weights[2])
    np.testing.assert_allclose(merge.mean(weights), np.mean([w.numpy() for w in weights], axis=0), rtol=1e-6)


@pytest.mark.parametrize("make", [merge.first, merge.last, merge.mean])
def test_the_result_is_a_tensor_of_its_own(weights, make):
    before = [weight.clone() for weight in weights]
    make(weights).zero_()
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_is_kept(weights, dtype):
    cast = [weight.to(dtype) for weight in weights]
    assert {
        merge.first(cast).dtype,
        merge.mean(cast).dtype,
        merge.regmean(cast, [torch.eye(4)] * 3).dtype,
    } == {dtype}


def test_mean_of_equal_half_precision_weights_is_exact():
    weight = torch.randn(8, 8).to(torch.bfloat16)
    assert torch.equal(merge.mean([weight] * 3), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_many_blocks_is_the_same_on_any_number_of_threads(dtype):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5 * merge.BLOCK + 7).to(dtype)) for _ in range(3)]
    expected = torch.stack([weight.detach().double() for weight in weights]).mean(0)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 50):
            torch.set_num_threads(count)
            found = merge.mean(weights)
            assert not found.requires_grad
            torch.testing.assert_close(
                found, expected.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0
            )
    finally:
        torch.set_num_threads(threads)


def test_regmean_is_the_least_squares_solution(weights):
    torch.manual_seed(1)
    inputs = [torch.randn(30, 4, dtype=torch.float64) * scale for scale in (1, 5, 0.2)]
    found = merge.regmean([w.double() for w in weights], [x.T @ x / len(x) for x in inputs], ridge=0)
    # |X_l M^T - X_l W_l^T| summed over l is one least-squares problem in M^T, each position weighed by its mean
    rows = np.concatenate([x.numpy() / len(x) ** 0.5 for x in inputs])
    target = np.concatenate(
        [(x @ w.double().T).numpy() / len(x) ** 0.5 for x, w in zip(inputs, weights, strict=True)]
    )
    solved, *_ = np.linalg.lstsq(rows, target, rcond=None)
    np.testing.assert_allclose(found.numpy(), solved.T, rtol=1e-8, atol=1e-10)


def test_regmean_is_the_mean_when_all_see_the_same(weights):
    gram = torch.eye(4)
    torch.testing.assert_close(merge.regmean(weights, [gram] * 3), merge.mean(weights))


def test_regmean_of_what_sees_nothing_at_all_is_the_mean(weights):
    torch.testing.assert_close(merge.regmean(weights, [torch.zeros(4, 4)] * 3), merge.mean(weights))


def test_regmean_without_activations_in_a_direction_falls_back_to_the_mean(weights):
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    merged = merge.regmean(weights, [gram, 2 * gram, 3 * gram])
    assert merged.isfinite().all()
    scale = torch.tensor([1.0, 2.0, 3.0]) / 6
    torch.testing.assert_close(merged[:, 3], sum(s * w[:, 3] for s, w in zip(scale, weights, strict=True)))
