"""Pivoted factors: the same product in rank² fewer numbers, wherever a model goes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import layershare
from laws import output
from layershare.errors import PlanError, StoreError
from layershare.heal.config import DistillConfig
from layershare.heal.distill import distill
from layershare.linear import FactoredLinear, PivotedLinear
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.prune import PruneConfig, prune
from layershare.prune.unstructured import input_squares, targets
from layershare.sharing.lowrank import pivoted, truncate
from layershare.stacks import find_stacks
from layershare.tasks import get_task
from layershare.train import in_plain_factors


def plan_for(model, *, pivots=True, rank=3):
    stacks = find_stacks(model)
    return SharingPlan(
        stacks=tuple(
            StackPlan(
                name=stack.name,
                length=stack.length,
                groups=tuple(
                    Group(positions=(p,), method="basis", rank=rank, pivots=pivots)
                    for p in range(stack.length)
                ),
            )
            for stack in stacks
        )
    )


@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (12, 5)])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_product_is_the_same_in_fewer_numbers(shape, rank):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw)
    gram = torch.diag(torch.rand(shape[1], generator=draw) * 100)
    up, down = truncate(weight, rank, gram)
    ours, rest, order = pivoted(up, down, gram)
    assert ours.numel() + rest.numel() == up.numel() + down.numel() - rank**2
    assert sorted(order.tolist()) == list(range(shape[1]))
    module = PivotedLinear(shape[1], shape[0], rank, bias=False)
    with torch.no_grad():
        module.up.copy_(ours), module.down.copy_(rest), module.order.copy_(order)
    x = torch.randn(2, 6, shape[1], generator=draw)
    torch.testing.assert_close(module(x), x @ (up @ down).T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module.rows(), up @ down, atol=1e-5, rtol=1e-4)


def test_pivots_are_inputs_that_are_large():
    """An input a thousand times as large as the others says most, whatever the weights are."""
    draw = torch.Generator().manual_seed(0)
    gram = torch.eye(8)
    gram[5, 5] = 1e6
    up, down = truncate(torch.randn(6, 8, generator=draw), 2, gram)
    _, rest, order = pivoted(up, down, gram)
    assert 5 in order[:2].tolist()
    size = gram.diagonal().sqrt()[order.long()]
    assert (rest * size[2:] / size[:2, None]).abs().max() <= 4  # beside what it multiplies


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_a_pivoted_model_computes_what_the_plain_one_does_and_comes_back_from_disk(tiny, kind, tmp_path):
    model = tiny(kind)
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    if kind == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    plain = layershare.share(model, plan_for(model, pivots=False), calibration=[inputs])
    student = layershare.share(model, plan := plan_for(model), calibration=[inputs])
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs)[0], plain(**inputs)[0], atol=1e-4, rtol=1e-3)
    maps = [m for m in student.modules() if isinstance(m, PivotedLinear)]
    factored = [m for m in plain.modules() if isinstance(m, FactoredLinear)]
    assert len(maps) == len(factored) > 0
    stored = layershare.count(student).layer_unique
    assert stored == layershare.predict(find_stacks(model), plan).layer_unique
    assert stored == layershare.count(plain).layer_unique + sum(m.in_features - 9 for m in maps)
    student.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], student(**inputs)[0])
        dense = layershare.unshare(student)
        torch.testing.assert_close(dense(**inputs)[0], student(**inputs)[0], atol=1e-5, rtol=1e-4)
    assert not any(isinstance(m, FactoredLinear) for m in dense.modules())


def test_bytes_are_predicted_where_indices_are_longer_than_numbers(tiny):
    model = tiny("bert").to(torch.bfloat16)
    student = layershare.share(model, plan := plan_for(model))
    saved = layershare.count(model).bytes_unique - layershare.count(student).bytes_unique
    cost = layershare.predict(find_stacks(model), plan)
    assert cost.layer_bytes_before - cost.layer_bytes == saved


def test_a_checkpoint_without_the_order_of_inputs_is_refused(tiny, tmp_path):
    model = tiny("bert")
    layershare.share(model, plan_for(model)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith(".order"))
    save_file({k: v for k, v in tensors.items() if k != gone}, file, metadata={"format": "pt"})
    with pytest.raises(StoreError, match="order"):
        type(model).from_pretrained(tmp_path)


def test_in_order_the_fit_is_that_of_plain_factors(tiny):
    model = tiny("bert")
    batches = [
        {"input_ids": torch.randint(5, 24, (8, 9), generator=torch.Generator().manual_seed(i))}
        for i in (0, 1)
    ]
    plain, student = (
        layershare.share(model, plan_for(model, pivots=p), calibration=batches, fit="sequential")
        for p in (False, True)
    )
    with torch.no_grad():
        torch.testing.assert_close(student(**batches[0])[0], plain(**batches[0])[0], atol=1e-3, rtol=1e-2)


def test_it_trains(tiny):
    model = tiny("bert")
    student = layershare.share(model, plan_for(model)).train()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    student(**inputs)[0].square().mean().backward()
    for module in student.modules():
        if isinstance(module, PivotedLinear):
            assert module.up.grad.abs().sum() > 0
            assert module.down.grad.abs().sum() > 0


def test_transposed_maps_keep_their_orientation():
    module = PivotedLinear.standing_for(Conv1D(6, 8), 2, base=False)
    assert module.weight.shape == (8, 6)
    assert isinstance(module.dense(), Conv1D)
    assert isinstance(PivotedLinear.standing_for(nn.Linear(8, 6), 2, base=False).dense(), nn.Linear)


@pytest.mark.parametrize("group", [
    {"positions": (0, 1), "method": "basis", "rank": 2}, {"positions": (0,), "rank": 2}, {"positions": (0, 1)},
])  # fmt: skip
def test_only_factors_of_one_position_have_pivots(group):
    with pytest.raises(PlanError, match="pivots = true is for method = 'basis' with one position"):
        SharingPlan.from_dict({"stacks": [{"name": "a", "length": 2, "groups": [{**group, "pivots": True}]}]})


def test_weights_are_pruned_by_what_each_factor_multiplies(tiny, batch_for):
    model, batch = tiny("bert"), batch_for("bert")
    student = layershare.share(model, plan_for(model))
    chosen = targets(student, find_stacks(student), ("ffn",))
    module = student.encoder.layer[0].output.dense
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    names = [f"encoder.layer.0.output.dense.{leaf}" for leaf in ("up", "down")]
    squares = input_squares(student, {name: chosen[name] for name in names}, [batch])
    order = module.order.long()
    pivots, rest = seen[0][..., order[:3]], seen[0][..., order[3:]]
    for name, read in zip(names, (pivots + rest @ module.down.detach().T, rest), strict=True):
        torch.testing.assert_close(squares[name].float(), read.square().sum((0, 1)), rtol=1e-4, atol=1e-8)
    pruned = prune(student, PruneConfig(what="weights", amount=0.5, by="wanda"), [batch])
    layershare.verify(pruned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_while_it_trains_the_factors_are_plain_balanced_and_of_the_same_product(tiny, batch_for, dtype):
    model, batch = tiny("bert").to(dtype), batch_for("bert")
    student = layershare.share(model, plan := plan_for(model), calibration=[batch])
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    before, maps = (
        output(student, batch),
        [n for n, m in student.named_modules() if isinstance(m, PivotedLinear)],
    )
    orders = {name: student.get_submodule(name).order.clone() for name in maps}
    with in_plain_factors(student):
        assert not any(isinstance(m, PivotedLinear) for m in student.modules())
        layershare.verify(student)
        torch.testing.assert_close(output(student, batch), before, **tolerance)
        sizes = [
            student.get_submodule(maps[0]).get_parameter(leaf).square().mean() for leaf in ("up", "down")
        ]
        torch.testing.assert_close(*sizes, rtol=0.05, atol=0)
        with torch.no_grad():
            student.get_submodule(maps[0]).up.mul_(1.5)
        moved = output(student, batch)
    assert layershare.verify(student, plan).counts == layershare.verify(student).counts
    torch.testing.assert_close(output(student, batch), moved, **tolerance)
    assert not torch.allclose(moved, before)
    assert all(torch.equal(student.get_submodule(name).order, order) for name, order in orders.items())


def test_distilling_heals_it_as_it_does_plain_factors(tiny, tokenizer, pairs_file, tmp_path):
    teacher, task = tiny("bert"), get_task("sentence-embedding")
    data = task.read([pairs_file], split=(1.0, 0.0, 0.0))
    config = DistillConfig(steps=6, batch_size=8, max_length=16, dropout=False)
    healed = []
    for pivots in (False, True):
        student = layershare.share(teacher, plan := plan_for(teacher, pivots=pivots))
        distill(student, teacher, tokenizer, task, data, config, tmp_path / str(pivots), quiet=True)
        assert layershare.verify(student, plan)
        healed.append(student)
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    plain, pivoted_ = (output(student, inputs) for student in healed)
    # Not to the last digit: balanced otherwise, and Adam divides small gradients by their own size.
    assert (plain - pivoted_).abs().max() < 0.1 * (plain - output(teacher, inputs)).abs().max()
