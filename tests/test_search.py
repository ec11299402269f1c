"""The automatic plan: within its budget, better than even ranks, and it drops what is worth nothing."""

import copy

import pytest
import torch

import layershare
from layershare.errors import PlanError
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing import search
from layershare.sharing.gate import has_gate
from layershare.sharing.make import drop_to
from layershare.sharing.moments import measure
from layershare.stacks import find_stacks


@pytest.fixture
def setting(tiny):
    """A function: kind -> model, batches, change."""

    def make(kind, **sizes):
        model = tiny(kind, **sizes)
        draw = torch.Generator().manual_seed(0)
        batches = [{"input_ids": torch.randint(5, 24, (32, 9), generator=draw)} for _ in range(3)]
        if kind == "t5":
            batches = [batch | {"decoder_input_ids": batch["input_ids"].flip(1)} for batch in batches]
        with torch.no_grad():
            before = [model(**batch)[0] for batch in batches]

        def change(other):
            with torch.no_grad():
                pairs = zip(batches, before, strict=True)
                return sum(float((other(**batch)[0] - was).square().sum()) for batch, was in pairs)

        return model, batches, change

    return make


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("budget", [0.8, 0.5])
def test_it_fits_the_budget_and_moves_less_than_even_ranks(setting, kind, budget):
    model, batches, change = setting(kind)
    stacks = find_stacks(model)
    moments = measure(model, batches)
    plan = search.automatic(model, stacks, budget, lambda: change, lambda: moments)
    cost = layershare.predict(stacks, plan)
    student = layershare.share(model, plan, calibration=moments)
    assert budget - 0.03 <= cost.ratio <= budget
    assert layershare.count(student).layer_unique == cost.layer_unique
    even = SharingPlan(stacks=tuple(evenly(stack, budget) for stack in stacks))
    assert layershare.predict(stacks, even).ratio <= budget
    assert change(student) < change(layershare.share(model, even, calibration=batches))


@pytest.mark.parametrize("pivots", [True, False])
def test_it_takes_pivots_unless_told_not_to(setting, pivots):
    model, batches, change = setting("bert")
    stacks, moments = find_stacks(model), measure(model, batches)
    plan = search.automatic(model, stacks, 0.6, lambda: change, lambda: moments, pivots=pivots)
    assert {group.pivots for group in plan.stacks[0].groups} == {pivots}
    assert 0.5 < layershare.predict(stacks, plan).ratio <= 0.6


def evenly(stack, budget):
    """Every matrix at the same density, the highest that fits."""
    for per_cent in range(99, 0, -1):
        groups = tuple(
            Group(positions=(p,), parts=(w.name,), method="basis", rank=rank)
            for p in range(stack.length)
            for w in stack.layers[p]
            if w.factorable and (rank := int(per_cent / 100 * w.size / sum(w.shape))) > 0
        )
        plan = StackPlan(name=stack.name, length=stack.length, groups=groups)
        if layershare.predict([stack], SharingPlan(stacks=(plan,))).ratio <= budget:
            return plan
    raise AssertionError(f"{budget} cannot be reached")


def test_a_position_that_does_nothing_is_dropped(setting):
    model, batches, _ = setting("gpt2")
    idle = model.transformer.h[2]
    with torch.no_grad():
        for module in (idle.attn.c_proj, idle.mlp.c_proj):
            module.weight.zero_()
            module.bias.zero_()
        before = [model(**batch)[0] for batch in batches]

    def moved(other):
        with torch.no_grad():
            return sum(
                float((other(**b)[0] - was).square().sum()) for b, was in zip(batches, before, strict=True)
            )

    was = copy.deepcopy(model.state_dict())
    plan = search.automatic(model, find_stacks(model), 0.6, lambda: moved, lambda: measure(model, batches))
    assert 2 in plan.stacks[0].drop
    assert model.state_dict().keys() == was.keys()  # no gate is left behind
    assert all(torch.equal(value, was[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_it_keeps_as_many_positions_as_it_is_told(setting, kind):
    model, batches, change = setting(kind)
    stacks, moments = find_stacks(model), measure(model, batches)
    plan = search.automatic(model, stacks, 0.4, lambda: change, lambda: moments, unique=2)
    assert [stack.length - len(stack.drop) for stack in plan.stacks] == [2] * len(stacks)
    assert 0.35 < layershare.predict(stacks, plan).ratio <= 0.4
    if kind == "bert":  # of one position the least missed is known by trying each
        one = search.automatic(model, stacks, 0.4, lambda: change, lambda: moments, unique=3)
        without = [
            SharingPlan(stacks=(drop_to(stacks[0], [p for p in range(4) if p != q]),)) for q in range(4)
        ]
        missed = [change(layershare.share(model, plan)) for plan in without]
        assert one.stacks[0].drop == (missed.index(min(missed)),)


def test_a_budget_out_of_reach_is_refused(setting):
    model, batches, change = setting("bert")
    with pytest.raises(PlanError, match="out of reach"):
        search.automatic(model, find_stacks(model), 0.01, lambda: change, lambda: measure(model, batches))


def test_drop_spreads_what_it_keeps(setting):
    model, _, _ = setting("bert")
    plan = search.SEARCHED["drop"](model, find_stacks(model), 0.5, None, None)
    assert plan.stacks[0].drop == (1, 2)


def test_plans_are_compared_as_they_will_be_fitted(setting):
    model, batches, change = setting("bert")
    stacks, moments, tried = find_stacks(model), measure(model, batches), []

    def fitted(plan):
        student = layershare.share(model, plan, calibration=batches[:1], fit="sequential", known=moments)
        tried.append((change(student), plan))
        return student

    plan = search.automatic(model, stacks, 0.3, lambda: change, lambda: moments, fitted=fitted)
    assert [len(one.stacks[0].drop) for _, one in tried] == list(range(len(tried)))
    assert len(tried) > 1
    assert plan == min(tried, key=lambda one: one[0])[1]


def test_an_answer_that_is_no_number_is_the_farthest(setting):
    model, batches, _ = setting("bert")
    stacks = find_stacks(model)

    def change(other):
        return float("nan") if any(has_gate(layer) for layer in other.encoder.layer) else 1.0

    plan = search.automatic(model, stacks, 0.4, lambda: change, lambda: measure(model, batches))
    assert plan.stacks[0].drop == ()


def test_nothing_is_fitted_where_a_position_is_missed_far_more_than_all_that_is_saved(setting):
    model, batches, _ = setting("bert")
    stacks = find_stacks(model)

    def change(other):
        return 2.5 if any(has_gate(layer) for layer in other.encoder.layer) else 1.0

    def fitted(_):
        raise AssertionError("fitted")

    plan = search.automatic(
        model, stacks, 0.4, lambda: change, lambda: measure(model, batches), fitted=fitted
    )
    assert plan.stacks[0].drop == ()


@pytest.mark.parametrize("unique", [None, 2])
def test_a_position_that_the_model_cannot_lose_is_kept(setting, unique):
    model, batches, _ = setting("t5")
    stacks = find_stacks(model)
    # The first has the relative positions of all.
    needed = [model.get_submodule(f"{stack.name}.0") for stack in stacks]

    def change(_):
        """0 where only the firsts are skipped, so that they seem to be missed least."""
        return float(not any(has_gate(layer) for layer in needed))

    plan = search.automatic(
        model, stacks, 0.6, lambda: change, lambda: measure(model, batches), unique=unique
    )
    assert all(0 not in stack.drop for stack in plan.stacks)
    assert unique is None or any(stack.drop for stack in plan.stacks)
    layershare.share(model, plan)  # it can be made


def test_a_model_of_fixed_length_keeps_all_and_says_so_where_fewer_are_wanted(setting):
    model, batches, change = setting("bert")

    class Fixed(type(model)):
        """Always of four layers, whatever its config says."""

        def __init__(self, config):
            super().__init__(config)
            while len(self.encoder.layer) < 4:
                self.encoder.layer.append(type(self.encoder.layer[0])(config))

    fixed = Fixed(model.config).eval()
    fixed.load_state_dict(model.state_dict())
    stacks, moments = find_stacks(fixed), measure(fixed, batches)
    plan = search.automatic(fixed, stacks, 0.3, lambda: change, lambda: moments)
    assert plan.stacks[0].drop == ()
    assert layershare.predict(stacks, plan).ratio <= 0.3
    with pytest.raises(PlanError, match=r"unique = 2: of the 4 layers of 'encoder.layer' 4 have to stay"):
        search.automatic(fixed, stacks, 0.3, lambda: change, lambda: moments, unique=2)


@pytest.mark.parametrize(("batches", "size", "fit", "judge"), [
    (1, 8, [0], [0]), (2, 8, [0], [1]), (5, 32, [0, 2, 4], [1, 3]), (64, 32, [*range(0, 64, 4)], [*range(1, 64, 4)]),
])  # fmt: skip
def test_plans_are_judged_by_texts_that_they_are_not_fitted_on(batches, size, fit, judge):
    made = [{"input_ids": torch.full((size, 1), i)} for i in range(batches)]
    some, judging = search.apart(made)
    assert [[int(one["input_ids"][0]) for one in side] for side in (some, judging)] == [fit, judge]
