"""Shared atoms: the best mix in closed form, carried from plan to folder and back like any other map."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

import laws
import layershare
from layershare.errors import ModelError, PlanError
from layershare.linear import AtomLinear, kind_of
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.prune import PruneConfig, prune
from layershare.sharing import lowrank

SHAPE = (6, 8)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(size, seed):
    """A second moment of badly scaled inputs."""
    rows = drawn(50, size, seed=seed) * torch.logspace(-1, 1, size, dtype=torch.float64)
    return rows.T @ rows / 50


def error(weights, atoms, mixes, metric, outputs):
    """sum_l tr(T D_l G D_l^T) of the differences D_l."""
    rest = [w - torch.einsum("s,soi->oi", mix, atoms) for w, mix in zip(weights, mixes, strict=True)]
    return sum(torch.trace(outputs @ one @ metric @ one.T) for one in rest)


@pytest.mark.parametrize("metric", ["weights", "inputs", "answer"])
def test_the_closed_form_is_what_a_solver_finds(metric):
    weights = [drawn(*SHAPE, seed=i) for i in range(4)]
    grams = None if metric == "weights" else [gram(8, 10)] * 4
    slopes = [gram(6, 20)] * 4 if metric == "answer" else None
    inputs = torch.eye(8, dtype=torch.float64) if grams is None else grams[0]
    outputs = torch.eye(6, dtype=torch.float64) if slopes is None else slopes[0]
    atoms, mixes = lowrank.atoms(weights, 2, grams, slopes)
    found = error(weights, atoms, mixes, inputs, outputs)
    shared, mix = drawn(2, *SHAPE, seed=7), drawn(4, 2, seed=8)
    stacked = torch.stack(weights)
    right = torch.linalg.cholesky(inputs)
    left = torch.linalg.cholesky(outputs)
    seen = (left.T @ stacked @ right).flatten(1)
    for _ in range(3000):  # alternating least squares, from a random start
        shared = torch.linalg.lstsq(mix, seen).solution
        mix = torch.linalg.lstsq(shared.T, seen.T).solution.T
    best = (seen - mix @ shared).square().sum()
    torch.testing.assert_close(found, best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [4, 6])
def test_as_many_atoms_as_matrices_are_exact(count):
    weights = [drawn(*SHAPE, seed=i) for i in range(4)]
    atoms, mixes = lowrank.atoms(weights, count, [gram(8, i) for i in range(4)])
    assert (len(atoms), len(mixes), len(mixes[0])) == (count, 4, count)
    for weight, mix in zip(weights, mixes, strict=True):
        torch.testing.assert_close(torch.einsum("s,soi->oi", mix, atoms), weight)


def test_a_mix_for_given_atoms_is_the_least_squares():
    weight, atoms, seen = drawn(*SHAPE, seed=1), drawn(3, *SHAPE, seed=2), gram(8, 3)
    half = lowrank.root(seen)
    columns = torch.stack([(atom @ half).flatten() for atom in atoms], dim=1)
    exact = torch.linalg.lstsq(columns, (weight @ half).flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(lowrank.fit_mix(weight, atoms, seen), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plain", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6)])
def test_it_stands_for_a_plain_map_and_its_dense_twin_does_the_same(plain):
    module, x = AtomLinear.standing_for(plain.eval(), 3, base=False), torch.randn(2, 5, 6)
    assert (module.atoms.shape, module.mix.shape) == ((12, 6), (3,))
    assert module.bias is plain.bias
    assert not module.training
    assert kind_of(module) == kind_of(plain) != "other"
    with torch.no_grad():
        for parameter in (module.atoms, module.mix):
            nn.init.normal_(parameter)
        dense = sum(c * atom for c, atom in zip(module.mix, module.atoms.split(4), strict=True))
    by_hand = x @ dense.T + (0 if module.bias is None else module.bias)
    torch.testing.assert_close(module(x), by_hand)
    torch.testing.assert_close(module.dense()(x), by_hand)
    module(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in (module.atoms, module.mix))


def test_with_all_atoms_a_model_computes_the_same(kind, tiny, batch_for):
    model = tiny(kind)
    group = Group(positions=(0, 1, 2, 3), parts=("attention", "ffn"), method="atoms", atoms=4)
    stacks = layershare.find_stacks(model)
    plan = SharingPlan(stacks=tuple(StackPlan(name=s.name, length=4, groups=(group,)) for s in stacks))
    shared = layershare.share(model, plan)
    outputs = [laws.output(one, batch_for(kind)) for one in (shared, model)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    assert layershare.count(shared).layer_unique == layershare.predict(stacks, plan).layer_unique


def test_the_gradient_of_a_shared_atom_is_the_sum_over_its_uses(tiny, batch_for):
    shared = layershare.share(tiny("bert"), layershare.make_plan(tiny("bert"), "atoms", unique=2))
    apart = copy.deepcopy(shared)
    modules = [m for m in apart.modules() if isinstance(m, AtomLinear)]
    for module in modules:
        module.atoms = nn.Parameter(module.atoms.detach().clone())
    for model in (shared, apart):
        laws.loss(model, batch_for("bert")).backward()
    ours = [m for m in shared.modules() if isinstance(m, AtomLinear)]
    uses = {}
    for one, other in zip(ours, modules, strict=True):
        uses.setdefault(id(one.atoms), (one.atoms, []))[1].append(other.atoms.grad)
    assert len(uses) == 6
    for atom, grads in uses.values():
        assert len(grads) == 4
        torch.testing.assert_close(atom.grad, torch.stack(grads).sum(0))


def test_mixes_fitted_in_order_are_nearer_to_the_answer(tiny):
    model = tiny("bert")
    plan = layershare.make_plan(model, "atoms", unique=2)
    batches = [{"input_ids": torch.randint(5, 24, (16, 9), generator=torch.Generator().manual_seed(0))}]
    before = laws.output(model, batches[0])

    def moved(**options):
        student = layershare.share(model, plan, **options)
        return float((laws.output(student, batches[0]) - before).square().sum())

    plain = moved()
    assert moved(calibration=batches, fit="sequential") < plain


def test_a_folder_loads_the_same_and_dropping_positions_keeps_the_rest(tiny, tmp_path):
    model = tiny("bert")
    shared = layershare.share(model, layershare.make_plan(model, "atoms", unique=2, parts="attention"))
    shared.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert laws.same(loaded, shared)
    layershare.verify(loaded)
    short = prune(loaded, PruneConfig(what="positions", amount=2))
    layershare.verify(short)
    assert layershare.plan_of(short).stacks[0].groups[0].atoms == 2


@pytest.mark.parametrize("what", ["neurons", "weights"])
def test_pruning_inside_is_refused(tiny, what):
    shared = layershare.share(tiny("bert"), layershare.make_plan(tiny("bert"), "atoms", unique=2))
    with pytest.raises(ModelError, match="atoms"):
        prune(shared, PruneConfig(what=what, amount=0.5))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(method="atoms"), "atoms = "),
        (dict(atoms=2), "go together"),
        (dict(method="atoms", atoms=2, rank=3), "takes no rank"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(values, words):
    with pytest.raises(PlanError, match=words):
        Group.parse({"positions": (0, 1), **values}, error=PlanError)


def test_the_preset_takes_what_the_budget_allows(tiny):
    model = tiny("bert")
    stacks = layershare.find_stacks(model)
    plan = layershare.make_plan(model, "atoms", budget=0.6)
    assert "mixed of 2 shared matrices" in str(plan)
    assert layershare.predict(stacks, plan).ratio <= 0.6
    assert layershare.predict(stacks, layershare.make_plan(model, "atoms", unique=3)).ratio > 0.6
