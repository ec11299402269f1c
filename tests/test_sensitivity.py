"""Sensitivities against closed forms on linear models, and ranks against exhaustive search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import layershare
from layershare.errors import DataError
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing.allocate import Spectrum, allocate, left
from layershare.sharing.lowrank import root
from layershare.sharing.moments import Moments, measure
from layershare.sharing.sensitivity import sensitivities
from layershare.sharing.statistics import collect


class Chain(nn.Module):
    """Two linear maps, then a third one that is not used."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle = nn.Linear(6, 4), nn.Linear(4, classes), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.first(x))


def vectors(model, batch):
    return model(batch["x"]), False


def logits(model, batch):
    return model(batch["x"]), True


def batches(count: int = 40, size: int = 64):
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(size, 6, generator=draw)} for _ in range(count)]


def test_of_vectors_they_are_the_maps_that_follow():
    model = Chain()
    found = sensitivities(model, ["first", "second"], batches(), answer=vectors)
    assert torch.allclose(found["second"], torch.eye(5), atol=0.06)
    after = model.second.weight.detach()
    assert torch.allclose(found["first"], after.T @ after, atol=0.06 * float((after.T @ after).max()))


def test_of_logits_they_are_the_fisher_information():
    model, data = Chain(classes=3), batches()
    found = sensitivities(model, ["second"], data, answer=logits)["second"]
    p = torch.cat([model(batch["x"]) for batch in data]).softmax(-1)
    wanted = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    assert torch.allclose(found, wanted, atol=0.02)


def test_the_energy_left_is_the_change_of_the_answer():
    model, data = Chain(), batches()
    before = root(collect_x(model, data), 0)
    slopes = sensitivities(model, ["first"], data, answer=vectors, probes=8)["first"]
    after = root(slopes, 0).T
    u, s, v = torch.linalg.svd(after @ model.first.weight.detach().double() @ before, full_matrices=False)
    cut = torch.linalg.inv(after) @ (u[:, :2] * s[:2]) @ v[:2] @ torch.linalg.inv(before)
    with torch.no_grad():
        was = torch.cat([model(batch["x"]) for batch in data])
        model.first.weight.copy_(cut)
        change = (torch.cat([model(batch["x"]) for batch in data]) - was).square().sum(-1).mean()
    predicted = left(Spectrum(s.square(), 10 * torch.arange(1, 5), 24), 2)
    assert float(change) == pytest.approx(predicted, rel=0.05)


def collect_x(model, data):
    rows = torch.cat([batch["x"] for batch in data])
    return (rows.T @ rows / len(rows)).double()


def test_padding_has_no_part_and_nothing_is_left_behind(tiny):
    bert = tiny("bert")
    ids = torch.randint(5, 24, (3, 7), generator=torch.Generator().manual_seed(0))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: torch.cat([value, torch.zeros_like(value[:, :2])], 1) for name, value in short.items()}
    name = "encoder.layer.1.intermediate.dense"
    trained = [parameter.requires_grad for parameter in bert.parameters()]
    bert.train()
    found = [sensitivities(bert, [name], [batch], probes=1, seed=3)[name] for batch in (short, padded, short)]
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(found[0], found[2])
    assert bert.training
    assert [parameter.requires_grad for parameter in bert.parameters()] == trained
    assert all(parameter.grad is None for parameter in bert.parameters())
    assert not bert.get_submodule(name)._forward_hooks
    assert set(collect(bert, [name], [short])) == {name}


def test_a_map_without_a_part_in_the_answer_is_refused():
    with pytest.raises(DataError, match="idle has no part"):
        sensitivities(Chain(), ["first", "idle"], batches(1), answer=vectors)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.15, 1.2), st.booleans())
def test_ranks_leave_little_more_than_the_best_of_all(seed, share, pivots):
    draw = torch.Generator().manual_seed(seed)
    spectra = []
    for rows, columns in ((4, 6), (5, 5), (3, 8)):
        values = torch.rand(min(rows, columns), generator=draw, dtype=torch.float64).sort(descending=True)[0]
        scale = 10 ** float(torch.rand(1, generator=draw) * 3)
        ranks = torch.arange(1, len(values) + 1)
        spectra.append(Spectrum(scale * values**3, ranks * (rows + columns - pivots * ranks), rows * columns))
    least, all_ = sum(one.cost(1) for one in spectra), sum(one.whole for one in spectra)
    budget = int(share * all_)
    if budget < least:
        with pytest.raises(ValueError, match=str(least)):
            allocate(spectra, budget)
        return
    found = allocate(spectra, budget)
    choices = [[*range(1, len(one.energies) + 1), None] for one in spectra]
    within = [some for some in itertools.product(*choices) if cost(spectra, some) <= budget]
    best = min(error(spectra, some) for some in within)
    assert cost(spectra, found) <= budget
    # Lagrangian choices skip at most one step of one matrix: from its rank to whole
    slack = max(left(one, rank) for one, rank in zip(spectra, found, strict=True))
    assert best <= error(spectra, found) <= best + slack + 1e-9


def cost(spectra, ranks):
    return sum(one.cost(rank) for one, rank in zip(spectra, ranks, strict=True))


def error(spectra, ranks):
    return sum(left(one, rank) for one, rank in zip(spectra, ranks, strict=True))


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_fitted_to_the_answer_it_moves_less_than_fitted_to_the_inputs(tiny, side):
    model = tiny("bert")
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(5, 24, (64, 9), generator=draw)} for _ in range(4)]
    group = Group(positions=(0, 1), parts=("attention", "ffn"), method="basis", rank=5, side=side)
    plan = SharingPlan(stacks=(StackPlan(name="encoder.layer", length=4, groups=(group,)),))
    moved = {}
    for fit in ("inputs", "answer"):
        student = layershare.share(model, plan, calibration=data, fit=fit)
        with torch.no_grad():
            moved[fit] = float((student(**data[0])[0] - model(**data[0])[0]).square().mean())
    assert moved["answer"] < moved["inputs"]
    known = measure(model, data)
    again = layershare.share(model, plan, calibration=known)
    for name, value in student.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_moments_of_another_model_are_refused(tiny, batch_for):
    model = tiny("bert")
    plan = layershare.make_plan(model, "basis", rank=4)
    with pytest.raises(layershare.LayershareError, match="moments"):
        layershare.share(model, plan, calibration=Moments({"a": torch.eye(2)}))
