"""Plans by name: what is asked is what is made, a budget is kept, and wrong wishes are named."""

import pytest

from laws import PRESETS
from layershare import find_stacks, make_plan, predict
from layershare.errors import PlanError
from layershare.sharing.make import BASES, SCHEMES, spread

DEPTH = {"gpt2": ["n_layer"], "t5": ["num_layers", "num_decoder_layers"]}
BUDGETS = [name for name in SCHEMES if name != "all"]


def groups(plan) -> list[tuple[int, ...]]:
    return [group.positions for group in plan.stacks[0].groups]


@pytest.mark.parametrize(
    ("wish", "positions"),
    [
        (dict(preset="all"), [(0, 1, 2, 3, 4, 5)]),
        (dict(preset="adjacent", unique=3), [(0, 1), (2, 3), (4, 5)]),
        (dict(preset="cycle", unique=2), [(0, 2, 4), (1, 3, 5)]),
        (dict(preset="cycle_rev", unique=3), [(0, 5), (1, 4), (2, 3)]),
        (dict(preset="sandwich"), [(1, 2, 3, 4)]),
        (dict(preset="sequence", unique=6), []),
        (dict(preset="gated", unique=2), [(0, 1, 2), (3, 4, 5)]),
        (dict(preset="gated", unique=1), [(0, 1, 2, 3, 4, 5)]),
        (dict(preset="basis", rank=4), [(0, 1), (2, 3), (4, 5)]),
    ],
)
def test_groups(tiny, wish, positions):
    plan = make_plan(tiny("bert", num_hidden_layers=6), **wish)
    assert groups(plan) == positions
    assert plan.stacks[0].length == 6


def test_wishes_reach_the_groups(tiny):
    plan = make_plan(tiny("bert"), "cycle", unique=2, parts="ffn", merge="last", rank=3)
    assert {(g.parts, g.merge, g.rank, g.method) for g in plan.stacks[0].groups} == {
        (("ffn",), "last", 3, "tie")
    }
    assert make_plan(tiny("bert"), "all").stacks[0].groups[0].parts == ("attention", "ffn")


def test_drop_keeps_evenly_spaced_positions(tiny):
    assert make_plan(tiny("bert", num_hidden_layers=6), "drop", unique=3).stacks[0].kept == (0, 3, 5)
    assert [spread(6, unique) for unique in (1, 2, 6)] == [(0,), (0, 5), (0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize("length", range(1, 15))
def test_spread_positions_are_different(length):
    for unique in range(1, length + 1):
        assert len(set(spread(length, unique))) == unique


def test_gated_starts_as_drop(tiny):
    model = tiny("bert", num_hidden_layers=6)
    gated, drop = (make_plan(model, name, unique=2).stacks[0] for name in ("gated", "drop"))
    assert tuple(gate.position for gate in gated.gates if gate.value == 1) == drop.kept
    assert tuple(gate.position for gate in gated.gates if gate.value == 0) == drop.drop
    assert all(group.source in drop.kept for group in gated.groups)


@pytest.mark.parametrize("preset", BUDGETS)
@pytest.mark.parametrize("budget", [0.6, 0.75])
def test_a_budget_is_used_up_and_kept(tiny, kind, preset, budget):
    model = tiny(kind, **dict.fromkeys(DEPTH.get(kind, ["num_hidden_layers"]), 6))
    stacks = find_stacks(model)
    plan = make_plan(model, preset, budget=budget)
    for stack, one in zip(stacks, plan.stacks, strict=True):
        alone = plan.model_copy(update={"stacks": (one,)})
        assert predict([stack], alone).ratio <= budget
        if preset in BASES:  # one more rank would be too much, or there is none
            (rank,) = {group.rank for group in one.groups}
            largest = min(min(w.shape) for w in stack.layers[1] if w.factorable)
            more = (make_plan([stack], preset, rank=rank + 1),) if rank + 1 < largest else ()
        else:
            mixed = one.groups[0].atoms if one.groups else stack.length
            unique = {"drop": len(one.kept), "atoms": mixed}.get(
                preset, stack.length - sum(len(g.positions) - 1 for g in one.groups)
            )
            more = () if preset == "sandwich" else (make_plan([stack], preset, unique=unique + 1),)
        assert all(predict([stack], other).ratio > budget for other in more)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (dict(preset="adjecent", unique=2), "'adjecent'. Did you mean 'adjacent'?"),
        (dict(preset="bassis", unique=2), "Did you mean 'basis'?"),
        (dict(preset="cycle"), "'cycle' needs either unique or budget"),
        (dict(preset="cycle", unique=2, budget=0.5), "either unique or budget"),
        (dict(preset="all", unique=1, budget=0.5), "either unique or budget"),
        (dict(preset="basis"), "'basis' needs either rank or budget"),
        (dict(preset="basis", unique=8), "'basis' takes no unique = 8"),
        (dict(preset="basis", rank=8, budget=0.5), "either rank or budget"),
        (dict(preset="basis", rank=-8), "-8"),
        (dict(preset="basis", budget=0.5, merge="regmean"), "'basis' takes no merge 'regmean'"),
        (dict(preset="gated", unique=2, rank=3), "'gated' takes no rank 3"),
        (dict(preset="gated", unique=2, merge="first"), "'gated' takes no merge 'first'"),
        (dict(preset="drop", unique=2, merge="last"), "'drop' takes no merge 'last'"),
        (dict(preset="drop", unique=9), "unique = 9 does not suit 4 layers"),
        (dict(preset="gated", unique=0), "unique = 0"),
        (dict(preset="cycle", unique=5), "given: 5"),
        (
            dict(preset="cycle", budget=0.01),
            "budget 1.0% of 'encoder.layer' is out of reach: the least that 'cycle'",
        ),
        (dict(preset="cycle", budget=1.5), "budget 1.5"),
        (dict(preset="cycle", budget=0), "budget 0"),
        (dict(preset="cycle", unique=2, merge="mena"), "'mena'"),
        (dict(preset="cycle", unique=2, merge="pick"), "source"),
        (dict(preset="cycle", unique=2, rank=-1), "-1"),
        (dict(preset="cycle", unique=2, parts=[]), "names no parts"),
        (dict(preset="gated", budget=0.5, parts="atention"), "'atention'"),
        (
            dict(preset="cycle", unique=2, stack="encoder.layers"),
            "'encoder.layers'. Did you mean 'encoder.layer'?",
        ),
    ],
)
def test_wrong_wishes_are_named(tiny, wish, words):
    with pytest.raises(PlanError) as caught:
        make_plan(tiny("bert"), **wish)
    assert words in str(caught.value)


def test_stacks_are_chosen_by_name(tiny):
    model = tiny("t5")
    names = [stack.name for stack in make_plan(model, "all", stack="decoder.block").stacks]
    assert names == ["decoder.block"]
    assert len(make_plan(model, "all", stack=["decoder.block", "decoder.block"]).stacks) == 1
    assert len(make_plan(find_stacks(model), "all").stacks) == 2


def test_a_stack_without_matrices_for_a_basis_is_told(tiny):
    with pytest.raises(PlanError, match="'basis' suits no length"):
        make_plan(tiny("bert"), "basis", budget=0.5, parts="norm")


def test_a_shared_model_is_not_planned_again(tiny):
    import layershare

    model = tiny("bert")
    shared = layershare.share(model, make_plan(model, "all"))
    with pytest.raises(PlanError, match=r"'encoder.layer' is shared already"):
        make_plan(shared, "all")


def test_every_scheme_is_tried_somewhere():
    assert {wish["preset"] for wish in PRESETS.values()} == set(SCHEMES)
