"""Pruning of single weights: what goes is the least, counted once, and stays away."""

from itertools import combinations

import pytest
import torch

import layershare
from layershare.errors import ModelError, OptionError
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.prune import PruneConfig, account, held, masks_of, prune, sparsity
from layershare.prune.importance import label_loss, wanda
from layershare.prune.select import lowest, lowest_in_rows, n_of_m, within_energy
from layershare.prune.unstructured import input_squares, scores, targets
from layershare.stacks import find_stacks
from layershare.train import TrainConfig, train


def shared(model):
    return layershare.share(model, layershare.make_plan(model, "cycle", unique=2))


def exact_loss(model, batch):
    """In float64, which transformers' own losses are not."""
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def matrices(model):
    return sum(t.parameter.numel() for t in targets(model, find_stacks(model), PARTS).values())


PARTS = ("attention", "ffn", "other")


def test_lowest_takes_exactly_as_many_also_among_equals():
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]), 3).tolist() == [False, True, True, False, True]
    assert lowest(torch.zeros(2, 3), 4).sum() == 4
    assert lowest_in_rows(torch.tensor([[3.0, 1, 2], [1, 1, 1]]), 1).tolist() == [
        [False, True, False],
        [True, False, False],
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.05, 0.8, 3.0])
def test_the_energy_rule_takes_the_largest_set(seed, threshold):
    energy = torch.rand(9, generator=torch.Generator().manual_seed(seed)).double().square()
    chosen = within_energy(energy, threshold)
    assert float(energy[chosen].sum()) <= threshold
    sizes = [n for n in range(10) for some in combinations(energy.tolist(), n) if sum(some) <= threshold]
    assert int(chosen.sum()) == max(sizes)
    if int(chosen.sum()) < 9:
        assert float(energy[chosen].sum() + energy[~chosen].min()) > threshold


def test_n_of_m_keeps_the_highest_of_each_group():
    gone = n_of_m(torch.tensor([[1.0, 4, 3, 2, 9, 8, 7, 6]]), 2, 4)
    assert gone.tolist() == [[True, False, False, True, False, False, True, True]]
    with pytest.raises(OptionError, match="does not divide"):
        n_of_m(torch.ones(2, 6), 2, 4)


@pytest.mark.parametrize("amount", [0.37, 101])
def test_a_shared_weight_is_counted_once(kind, amount, tiny):
    student = shared(tiny(kind))
    size = matrices(student)
    pruned = prune(student, PruneConfig(what="weights", amount=amount))
    zeros = sum(int((t.parameter == 0).sum()) for t in targets(pruned, find_stacks(pruned), PARTS).values())
    assert zeros == (amount if isinstance(amount, int) else int(amount * size))
    assert layershare.verify(pruned).tied == layershare.verify(student).tied
    assert sparsity(student)[0] == 0
    found = account(student, pruned)
    assert found.zeros == zeros
    assert found.weights >= size
    assert found.tied > 0


def test_global_magnitude_takes_the_smallest(tiny):
    model = tiny("bert")
    pruned = prune(model, PruneConfig(what="weights", amount=0.3, parts=("ffn",)))
    before, after = (
        torch.cat([t.parameter.flatten() for t in targets(m, find_stacks(m), ("ffn",)).values()])
        for m in (model, pruned)
    )
    gone = after == 0
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(before[~gone], after[~gone])
    query = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(model.get_parameter(query), pruned.get_parameter(query))


def test_the_scopes_and_the_pattern_in_closed_form(kind, tiny, batch_for):
    model = tiny(kind)
    for target in targets(
        m := prune(model, PruneConfig(what="weights", amount=0.3, scope="layer")), find_stacks(m), PARTS
    ).values():
        assert int((target.parameter == 0).sum()) == int(0.3 * target.parameter.numel())
    pruned = prune(
        model, PruneConfig(what="weights", amount=0.25, scope="row", by="wanda"), [batch_for(kind)]
    )
    for target in targets(pruned, find_stacks(pruned), ("ffn",)).values():
        assert ((target.rows(target.parameter) == 0).float().mean(1) == 0.25).all()
    pruned = prune(model, PruneConfig(what="weights", pattern="2:4"))
    for target in targets(pruned, find_stacks(pruned), ("attention", "ffn")).values():
        if target.linear:
            assert ((target.rows(target.parameter).reshape(-1, 4) == 0).sum(1) == 2).all()


def test_wanda_by_hand_over_all_uses_of_a_shared_weight(tiny, batch_for):
    weight, x = torch.tensor([[1.0, -2], [3, 4]]), torch.tensor([[3.0, 1], [4, 0]])
    assert wanda(weight, x.square().sum(0)).tolist() == [[5, 2], [15, 4]]
    student, batch = shared(tiny("gpt2")), batch_for("gpt2")
    chosen = targets(student, find_stacks(student), ("ffn",))
    seen = []
    for position in (0, 2):
        student.transformer.h[position].mlp.c_proj.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].detach())
        )
    with torch.no_grad():
        student(**batch)
    norm = torch.cat([x.flatten(0, 1) for x in seen]).norm(dim=0)
    name = "transformer.h.0.mlp.c_proj.weight"
    found = scores(student, chosen, "wanda", [batch], label_loss)[name]
    torch.testing.assert_close(found, student.get_parameter(name).detach().abs() * norm[:, None])


def test_taylor_of_a_weight_is_the_slope_of_the_loss(tiny, batch_for):
    student, batch = shared(tiny("gpt2").double()), batch_for("gpt2")
    batch["labels"] = batch["input_ids"]
    name = "transformer.h.0.mlp.c_proj.weight"
    found = scores(student, targets(student, find_stacks(student), ("ffn",)), "taylor", [batch], label_loss)[
        name
    ]
    weight = student.get_parameter(name).data
    for i, j in ((0, 0), (17, 5)):
        old, values = float(weight[i, j]), []
        for factor in (1 + 1e-4, 1 - 1e-4):
            weight[i, j] = old * factor
            values.append(float(exact_loss(student, batch).detach()))
        weight[i, j] = old
        assert float(found[i, j]) == pytest.approx(abs(values[0] - values[1]) / 2e-4, rel=1e-3)


def test_factors_are_pruned_as_they_are_stored(tiny, batch_for, tmp_path):
    model, batch = tiny("bert"), batch_for("bert")
    group = Group(positions=(0, 1), parts=("ffn",), rank=4)
    student = layershare.share(
        model, SharingPlan(stacks=(StackPlan(name="encoder.layer", length=4, groups=(group,)),))
    )
    chosen = targets(student, find_stacks(student), ("ffn",))
    leaves = [name.rpartition(".")[2] for name in chosen if ".0." in name or ".1." in name]
    assert sorted(leaves) == ["base"] * 2 + ["down"] * 4 + ["up"] * 4
    up = "encoder.layer.0.output.dense.up"
    seen = []
    student.encoder.layer[0].output.dense.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    squares = input_squares(student, {up: chosen[up]}, [batch])[up]
    low = seen[0] @ student.encoder.layer[0].output.dense.down.detach().T
    torch.testing.assert_close(squares.float(), low.square().sum((0, 1)), rtol=1e-4, atol=1e-8)
    pruned = prune(student, PruneConfig(what="weights", amount=0.5, by="wanda"), [batch])
    layershare.verify(pruned)
    pruned.save_pretrained(tmp_path)
    again = type(pruned).from_pretrained(tmp_path).eval()
    assert sparsity(again) == sparsity(pruned)
    with torch.no_grad():
        assert torch.equal(again(**batch).last_hidden_state, pruned(**batch).last_hidden_state)


def test_the_energy_form_on_a_model_and_with_a_given_importance(tiny):
    student = shared(tiny("bert"))
    chosen = targets(student, find_stacks(student), PARTS)
    energy = (
        torch.cat([t.parameter.detach().flatten() for t in chosen.values()]).double().square().sort().values
    )
    limit = 0.1 * float(energy.sum())
    count = int((energy.cumsum(0) <= limit).sum())
    for config in (
        PruneConfig(what="weights", threshold=0.1, relative=True),
        PruneConfig(what="weights", threshold=limit),
    ):
        assert abs(sparsity(prune(student, config))[0] - count) <= 1  # the last sum is a float
    name = next(iter(chosen))
    alpha = {n: torch.tensor(0.0 if n == name else 1.0) for n in chosen}
    pruned = prune(student, PruneConfig(what="weights", threshold=1e-12), alpha=alpha)
    assert bool((pruned.get_parameter(name) == 0).all())
    assert sparsity(pruned)[0] == chosen[name].parameter.numel()
    with pytest.raises(OptionError, match="not pruned"):
        prune(student, PruneConfig(what="weights", threshold=1.0), alpha={"nowhere": torch.ones(())})
    with pytest.raises(OptionError, match="shape"):
        prune(student, PruneConfig(what="weights", threshold=1.0), alpha={name: torch.ones(3)})


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_zeros_stay_zero_in_training_and_ties_stay_ties(optimizer, tiny, batch_for):
    student, batch = shared(tiny("llama")), batch_for("llama")
    batch["labels"] = batch["input_ids"]
    pruned = prune(student, PruneConfig(what="weights", amount=0.5))
    before, zeros = sparsity(pruned)[0], masks_of(pruned)
    with held(pruned) as masks:
        step = optimizer(pruned.parameters(), lr=1e-2)
        for _ in range(3):
            step.zero_grad()
            pruned(**batch).loss.backward()
            step.step()
            assert all(bool((pruned.get_parameter(name)[mask] == 0).all()) for name, mask in masks.items())
            layershare.verify(pruned)
    assert sparsity(pruned)[0] == before
    changed = [
        n
        for n, mask in zeros.items()
        if not torch.equal(pruned.get_parameter(n)[~mask], student.get_parameter(n)[~mask])
    ]
    assert changed
    pruned(**batch).loss.backward()
    step.step()
    assert sparsity(pruned)[0] < before  # nothing is held any more


def test_zeros_survive_our_own_training_and_the_file(tiny, tmp_path):
    from datasets import Dataset

    pruned = prune(shared(tiny("llama")), PruneConfig(what="weights", pattern="2:4"))
    pruned.save_pretrained(tmp_path / "a")
    model = type(pruned).from_pretrained(tmp_path / "a")
    zeros = sparsity(model)[0]
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 8})

    def collate(rows):
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    def loss(model, batch):
        return {"ce": model(**batch, labels=batch["input_ids"]).loss}

    with held(model):
        train(
            model,
            rows,
            collate,
            loss,
            TrainConfig(steps=3, batch_size=4, ema_decay=0.9),
            tmp_path / "run",
            quiet=True,
        )
    assert sparsity(model)[0] == zeros
    layershare.verify(model)


def test_an_unpruned_model_is_not_held(tiny):
    with held(tiny("bert")) as masks:
        assert masks == {}
    with pytest.raises(OptionError, match="nowhere"), held(tiny("bert"), {"nowhere": torch.ones(1)}):
        pass
    with pytest.raises(ModelError, match="shape"), held(tiny("bert"), {"pooler.dense.weight": torch.ones(1)}):
        pass


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"amount": 10**7}, "all"),
        ({"threshold": 1e9}, "all"),
        ({"threshold": 1e-30}, "nothing"),
        ({"amount": 0.5, "parts": ("fnn",)}, "fnn"),
        ({"amount": 0.5, "parts": ("norm",)}, "no matrix"),
        ({"pattern": "2:5"}, "does not divide"),
    ],
)
def test_pruning_all_or_nothing_is_refused(values, words, tiny):
    with pytest.raises(OptionError, match=words):
        prune(tiny("bert"), PruneConfig(what="weights", **values))


def test_an_optimizer_with_momentum_from_before_does_not_bring_weights_back(tiny, batch_for):
    pruned, batch = prune(tiny("gpt2"), PruneConfig(what="weights", amount=0.5)), batch_for("gpt2")
    batch["labels"] = batch["input_ids"]
    before, masks = sparsity(pruned)[0], masks_of(pruned)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-2, momentum=0.9)

    def step():
        optimizer.zero_grad()
        pruned(**batch).loss.backward()
        optimizer.step()

    step()
    assert sparsity(pruned)[0] < before
    with held(pruned, masks):
        assert sparsity(pruned)[0] == before
        step()
        assert sparsity(pruned)[0] == before
