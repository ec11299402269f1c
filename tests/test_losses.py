"""The losses: closed forms, gradients by finite differences, and the laws of identity and padding."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layershare.heal import losses

VECTOR_LOSSES = [losses.embedding_cosine, losses.similarity]
MASKED_LOSSES = [losses.soft_kl, losses.logit_mse, losses.match_logits, losses.hidden_mse]
ALL = VECTOR_LOSSES + MASKED_LOSSES


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def name(loss: Callable) -> str:
    return loss.__name__


@pytest.mark.parametrize("loss", ALL, ids=name)
def test_identical_student_and_teacher_cost_exactly_nothing(loss):
    same = draw(5, 7).float()
    assert loss(same, same.clone()).item() == 0.0


@pytest.mark.parametrize("loss", ALL, ids=name)
def test_different_ones_cost_something(loss):
    assert loss(draw(5, 7), draw(5, 7, seed=1)).item() > 1e-3


@pytest.mark.parametrize("loss", ALL, ids=name)
def test_gradient_agrees_with_finite_differences(loss):
    student, teacher = draw(4, 3).requires_grad_(), draw(4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student,))


@pytest.mark.parametrize("loss", MASKED_LOSSES, ids=name)
@pytest.mark.parametrize("junk", [0.0, 1e6, float("inf"), float("nan")])
def test_padding_changes_neither_value_nor_gradient(loss, junk):
    student, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    short: Any = student.clone().requires_grad_()
    expected = loss(short, teacher, mask=torch.ones(2, 3))
    expected.backward()

    pad = torch.full((2, 5, 4), junk, dtype=torch.float64)
    long: Any = torch.cat([student, pad], dim=1).requires_grad_()
    mask = torch.tensor([[1] * 3 + [0] * 5] * 2)
    padded = loss(long, torch.cat([teacher, pad], dim=1), mask=mask)
    padded.backward()

    assert padded.item() == expected.item()
    assert torch.equal(long.grad[:, :3], short.grad)
    assert not long.grad[:, 3:].any()


@pytest.mark.parametrize("loss", MASKED_LOSSES, ids=name)
def test_no_mask_means_everything(loss):
    student, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    assert loss(student, teacher).item() == pytest.approx(
        loss(student, teacher, mask=torch.ones(2, 3)).item()
    )


def test_kl_of_two_coins_is_the_formula():
    # Teacher (3/4, 1/4), student (1/2, 1/2): KL(p || q) = log 2 - H(p).
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert losses.soft_kl(student, teacher).item() == pytest.approx(math.log(2) - entropy, rel=1e-6)


def test_kl_is_not_the_swapped_one():
    # The swapped order would be KL(q || p) = 1/2 log(1/2 / 3/4) + 1/2 log(1/2 / 1/4).
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    swapped = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert losses.soft_kl(teacher, student).item() == pytest.approx(swapped, rel=1e-6)
    assert abs(losses.soft_kl(student, teacher).item() - swapped) > 0.01


def test_kl_agrees_with_torch_distributions():
    student, teacher = draw(6, 5), draw(6, 5, seed=1)
    p, q = (torch.distributions.Categorical(logits=x / 3) for x in (teacher, student))
    expected = torch.distributions.kl_divergence(p, q).mean() * 9
    assert losses.soft_kl(student, teacher, temperature=3).item() == pytest.approx(expected.item())


def test_kl_gradient_keeps_its_size_at_high_temperature():
    # For T -> inf the gradient of T^2 KL is (z_s - z_t) / C for centred logits (Hinton et al. 2015, eq. 4).
    student, teacher = draw(1, 5).requires_grad_(), draw(1, 5, seed=1)
    losses.soft_kl(student, teacher, temperature=1e4).backward()
    difference = (student - teacher).detach()
    torch.testing.assert_close(student.grad, (difference - difference.mean()) / 5, rtol=1e-3, atol=1e-5)


def test_kl_survives_extreme_logits():
    student: Any = torch.tensor([[1e4, -1e4]], requires_grad=True)
    losses.soft_kl(student, torch.tensor([[-1e4, 1e4]])).backward()
    assert torch.isfinite(student.grad).all()


def test_match_logits_is_half_the_weighted_sum():
    student, teacher = draw(4, 3), draw(4, 3, seed=1)
    expected = (losses.soft_kl(student, teacher, 2.0) + 0.3 * (student - teacher).square().mean()) / 2
    assert losses.match_logits(student, teacher, 2.0, 0.3).item() == pytest.approx(expected.item())


def test_the_loss_of_the_mission_is_n_times_ours():
    # L = 1/2 sum(KL(p || q) T^2 + lambda MSE(z_t, z_s)), written out for each of n entries.
    student, teacher, t, weight = draw(5, 3), draw(5, 3, seed=1), 3.0, 0.7
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(z / t) / sum(math.exp(o / t) for o in row) for z in row] for row in (ours, theirs))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * t**2
        total += weight * sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / 3
    assert 5 * losses.match_logits(student, teacher, t, weight).item() == pytest.approx(total / 2)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_what_circulating_examples_compute_is_something_else():
    student, teacher = draw(5, 3), draw(5, 3, seed=1)
    p, q = teacher.softmax(-1), student.softmax(-1)
    ours = losses.soft_kl(student, teacher).item()
    kl_div = torch.nn.functional.kl_div
    assert kl_div(q.log(), p, reduction="batchmean").item() == pytest.approx(ours)
    assert abs(kl_div(q, p, reduction="batchmean").item() - ours) > 0.1  # probabilities for log-probabilities
    assert abs(kl_div(p, p, reduction="batchmean").item()) > 0.1  # which is not 0 for equal models
    assert abs(kl_div(p.log(), q, reduction="batchmean").item() - ours) > 0.01  # arguments swapped
    assert kl_div(q.log(), p, reduction="mean").item() == pytest.approx(ours / 3)  # divided by C as well


def test_all_logits_kept_are_all_logits():
    student, teacher = draw(4, 6), draw(4, 6, seed=1)
    whole = losses.match_logits(student, teacher, 2.0, 0.5)
    assert losses.match_logits(student, losses.keep_top(teacher, 6, 2.0), 2.0, 0.5).item() == pytest.approx(
        whole.item()
    )


def test_top_logits_see_the_others_as_one():
    student, teacher = draw(4, 6), draw(4, 6, seed=1)
    kept = losses.keep_top(teacher, 2, 2.0)
    p, q = (x.div(2).softmax(-1) for x in (teacher, student))
    p2, q2 = (x.gather(-1, kept.indices) for x in (p, q))
    p3, q3 = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p2, q2))
    expected = (p3 * (p3 / q3).log()).sum(-1).mean() * 4 / 2
    ours = losses.match_logits(student, kept, 2.0, 0.0)
    assert ours.item() == pytest.approx(expected.item())
    assert 0 < ours.item() < losses.match_logits(student, teacher, 2.0, 0.0).item()
    x = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.match_logits(x, kept, 2.0, 0.5), (x,))
    same = losses.match_logits(teacher.float(), losses.keep_top(teacher.float(), 2, 2.0), 2.0)
    assert same.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("junk", [0.0, float("inf"), float("nan")])
def test_top_logits_of_padding_do_not_count(junk):
    student, teacher = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    expected = losses.match_logits(student, losses.keep_top(teacher, 2))
    long = torch.cat([student, torch.full((2, 2, 5), junk, dtype=torch.float64)], 1).requires_grad_()
    padded = torch.cat([teacher, torch.zeros(2, 2, 5, dtype=torch.float64)], 1)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    loss = losses.match_logits(long, losses.keep_top(padded, 2), mask=mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item())
    assert not long.grad[:, 3:].any()  # type: ignore[index]


def test_label_cross_entropy_counts_the_labelled_entries_alone():
    logits, labels = draw(2, 3, 4), torch.tensor([[1, -100, 0], [-100, -100, 3]])
    log = logits.log_softmax(-1)
    expected = -(log[0, 0, 1] + log[0, 2, 0] + log[1, 2, 3]) / 3
    assert losses.label_ce(logits, labels).item() == pytest.approx(expected.item())
    nothing = losses.label_ce(logits.requires_grad_(), torch.full((2, 3), -100))
    nothing.backward()
    assert nothing.item() == 0


def test_relation_by_hand():
    student, teacher = draw(1, 3, 4), draw(1, 3, 6, seed=1)
    total = 0.0
    for head in range(2):
        a, b = student[0, :, 2 * head : 2 * head + 2], teacher[0, :, 3 * head : 3 * head + 3]
        q, p = (a @ a.T / 2**0.5).softmax(-1), (b @ b.T / 3**0.5).softmax(-1)
        total += float((p * (p / q).log()).sum())
    assert losses.relation(student, teacher, 2).item() == pytest.approx(total / 6)


def test_relation_of_equals_and_its_gradient():
    student, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    assert losses.relation(teacher, teacher.clone(), 2).item() == 0
    x = student.requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: losses.relation(x, teacher, 2, mask), (x,))


@pytest.mark.parametrize("junk", [0.0, 1e6, float("inf"), float("nan")])
def test_padding_is_no_part_of_a_relation(junk):
    student, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    short: Any = student.clone().requires_grad_()
    expected = losses.relation(short, teacher, 2)
    expected.backward()
    pad = torch.full((2, 5, 4), junk, dtype=torch.float64)
    long: Any = torch.cat([student, pad], dim=1).requires_grad_()
    mask = torch.tensor([[1] * 3 + [0] * 5] * 2)
    padded = losses.relation(long, torch.cat([teacher, pad], dim=1), 2, mask)
    padded.backward()
    assert padded.item() == pytest.approx(expected.item())
    torch.testing.assert_close(long.grad[:, :3], short.grad)
    assert not long.grad[:, 3:].any()


def test_hidden_mse_is_relative_to_the_teacher():
    teacher = draw(2, 3, 4)
    assert losses.hidden_mse(torch.zeros_like(teacher), teacher).item() == pytest.approx(1)
    assert losses.hidden_mse(1.1 * teacher, teacher).item() == pytest.approx(0.01)
    assert losses.hidden_mse(110 * teacher, 100 * teacher).item() == pytest.approx(0.01)


@pytest.mark.parametrize(("angle", "expected"), [(0, 0), (60, 0.5), (90, 1), (180, 2)])
def test_embedding_cosine_of_known_angles(angle, expected):
    turned = torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))]])
    assert losses.embedding_cosine(3 * turned, torch.tensor([[0.5, 0]])).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_similarity_of_known_vectors():
    student = torch.tensor([[1.0, 0], [1, 0]])  # cosine 1
    teacher = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0]])  # cosine 0.6, of another width
    assert losses.similarity(student, teacher).item() == pytest.approx(0.16)


def test_similarity_does_not_see_a_rotation():
    teacher = draw(6, 4)
    rotation, _ = torch.linalg.qr(draw(4, 4, seed=1))
    assert losses.similarity(teacher @ rotation, teacher).item() == pytest.approx(0, abs=1e-12)
    assert losses.embedding_cosine(teacher @ rotation, teacher).item() > 0.1


def test_similarity_of_one_text_is_nothing_and_still_has_a_gradient():
    student = draw(1, 4).requires_grad_()
    loss = losses.similarity(student, draw(1, 4, seed=1))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()
