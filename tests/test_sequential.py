"""Sequential calibration: least squares against a solver, statistics against plain sums, and it pays."""

import pytest
import torch

from laws import SHARED, output, plan_for, same
from layershare import make_plan, share, verify
from layershare.errors import DataError, PlanError
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing import sequential
from layershare.sharing.moments import Moments, measure
from layershare.sharing.pairs import Paired, collect_pairs, readers_of_sums
from layershare.sharing.sequential import aim_of
from layershare.sharing.statistics import collect, order_of_calls
from layershare.stacks import find_stacks


def samples(seed: int, count: int = 200, size: int = 6) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_of(y: torch.Tensor, gap: torch.Tensor) -> Paired:
    return Paired(y.T @ y / len(y), y.mean(0), gap.T @ y / len(y), gap.mean(0))


def texts(batch_for, kind, count=6):
    """Enough batches that no map sees fewer tokens than it has inputs."""
    batches = []
    for shift in range(count):
        one = dict(batch_for(kind))
        for name, value in one.items():
            one[name] = value.roll(shift, -1) if value.is_floating_point() else (value + 3 * shift) % 20 + 5
        batches.append(one)
    return batches


@pytest.mark.parametrize("biased", [True, False])
def test_the_whole_way_is_the_least_squares_solution(biased):
    x, y = samples(0) + 1, samples(0) + 0.3 * samples(1) - 1
    weight, bias = samples(2, 4), samples(3, 1, 4)[0] if biased else None
    target = x @ weight.T + samples(4, size=4)  # what the map should say, sum and all
    now = y @ weight.T + (0 if bias is None else bias)
    aim = aim_of(weight, bias, pair_of(y, target - now), ridge=1e-12, step=1.0)
    seen = torch.cat([y, torch.ones(len(y), 1)], 1) if biased else y
    wanted = torch.linalg.lstsq(seen, target).solution.T
    torch.testing.assert_close(aim.weight, wanted[:, :6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aim.output, target.mean(0))
    if biased:
        torch.testing.assert_close(aim.output - aim.weight @ aim.seen, wanted[:, 6], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(aim.gram, y.T.cov(correction=0), rtol=1e-4, atol=1e-5)


def test_where_nothing_has_changed_the_map_stays():
    x, weight = samples(0), samples(1, 4)
    torch.testing.assert_close(
        aim_of(weight, None, pair_of(x, torch.zeros(200, 4, dtype=x.dtype))).weight, weight
    )


def test_ridge_pulls_towards_the_original_weights():
    x, y, weight = samples(0), samples(0) + 0.3 * samples(1), samples(2, 4)
    pair = pair_of(y, (x - y) @ weight.T)
    steps = [float((aim_of(weight, None, pair, ridge=r).weight - weight).norm()) for r in (1e-6, 1.0, 1e6)]
    assert steps[0] > steps[1] > steps[2]
    assert steps[2] < 1e-5


def test_pairs_are_counted_over_what_both_models_see(tiny, batch_for):
    """Of a map that is added to the stream, the gap is that of the sum."""
    original, other = tiny("bert"), tiny("bert", seed=3)
    module, mask = "encoder.layer.1.output.dense", torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    norm = "encoder.layer.1.output.LayerNorm"
    batch = batch_for("bert") | {"attention_mask": mask}
    seen = {}
    for name, model in (("x", original), ("y", other)):
        dense = model.get_submodule(module)
        hooks = [
            dense.register_forward_hook(
                lambda _, args, out, name=name: seen.update(
                    {name: args[0][mask.bool()], name + "out": out[mask.bool()]}
                )
            ),
            model.get_submodule(norm).register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name + "sum", args[0][mask.bool()])
            ),
        ]
        output(model, batch)
        for hook in hooks:
            hook.remove()
    for what, sums in (("out", None), ("sum", {module: (norm, norm)})):
        found = collect_pairs(original, other, {module: module}, [batch, batch], sums)[module]
        gap = seen["x" + what] - seen["y" + what]
        torch.testing.assert_close(found.gram, seen["y"].T @ seen["y"] / 10)
        torch.testing.assert_close(found.mean, seen["y"].mean(0))
        torch.testing.assert_close(found.shift, gap.T @ seen["y"] / 10)
        torch.testing.assert_close(found.lift, gap.mean(0))
        torch.testing.assert_close(found.gram, collect(other, [module], [batch])[module])


READERS = {
    "bert": (
        "encoder.layer",
        {"attention.output.dense": "0.attention.output.LayerNorm", "output.dense": "0.output.LayerNorm"},
    ),
    "llama": ("model.layers", {"self_attn.o_proj": "0.post_attention_layernorm", "mlp.down_proj": "1"}),
    "gpt2": ("transformer.h", {"attn.c_proj": "0.ln_2", "mlp.c_proj": "1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_the_sums_are_found_by_trying(name, tiny, batch_for):
    model, (stack, wanted) = tiny(name), READERS[name]
    layer = find_stacks(model)[0].layers[0]
    maps = [f"{stack}.0.{weight.name}".rpartition(".")[0] for weight in layer if weight.factorable]
    found = readers_of_sums(model, maps, batch_for(name))
    assert found == {f"{stack}.0.{leaf}": f"{stack}.{reader}" for leaf, reader in wanted.items()}


def test_order_of_calls_puts_together_what_sees_one_tensor(tiny, batch_for):
    model = tiny("llama")
    leaves = ["mlp.down_proj", "self_attn.v_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj"]
    names = [f"model.layers.{i}.{leaf}" for i in (1, 0) for leaf in leaves]
    steps = order_of_calls(model, names, [batch_for("llama")])
    wanted = [
        {"self_attn.v_proj", "self_attn.q_proj"},
        {"self_attn.o_proj"},
        {"mlp.up_proj"},
        {"mlp.down_proj"},
    ]
    assert [set(step) for step in steps] == [
        {f"model.layers.{layer}.{leaf}" for leaf in leaves} for layer in (0, 1) for leaves in wanted
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_moments_are_plain_sums_and_spare_the_output_layer(kind, tiny, batch_for):
    """All maps of the model, those that see one tensor and those behind the output layer, if it is asked for itself."""
    model, batches = tiny(kind), texts(batch_for, kind, 3)
    maps = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    wanted = dict.fromkeys(maps, 0)
    calls = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: wanted.__setitem__(name, wanted[name] + _gram(args[0]))
        )
        for name in maps
    ]
    for batch in batches:
        output(model, batch)
    for hook in hooks:
        hook.remove()
    model.get_submodule(head).register_forward_hook(lambda *_: calls.append(1))
    found = collect(model, [name for name in maps if name != head], batches)
    assert len(calls) == 1
    found |= collect(model, [head], batches)
    for name in maps:
        torch.testing.assert_close(found[name], wanted[name] / sum(b["input_ids"].numel() for b in batches))


def _gram(given):
    rows = given.flatten(0, -2)
    return rows.T @ rows


def test_a_module_that_is_never_called_is_an_error(tiny, batch_for):
    model = tiny("bert")
    model.add_module("idle", torch.nn.Linear(2, 2))
    with pytest.raises(DataError, match="never reaches idle"):
        order_of_calls(model, ["idle"], [batch_for("bert")])
    with pytest.raises(DataError, match="has no batch"):
        collect_pairs(model, model, {"pooler.dense": "pooler.dense"}, [])
    with pytest.raises(DataError, match="has no batch"):
        share(model, make_plan(model, "basis", rank=4), calibration=[], fit="sequential")


@pytest.mark.parametrize("name", SHARED)
def test_every_plan_is_shared_in_order_and_keeps_its_ties(kind, name, tiny, batch_for):
    model = tiny(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_for(model, name)
    student = share(model, plan, calibration=texts(batch_for, kind, 2), fit="sequential")
    verify(student, plan)
    assert output(student, batch_for(kind)).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_that_are_equal_already_are_shared_without_loss(kind, tiny, batch_for):
    model = tiny(kind)
    for stack in find_stacks(model):
        layers = model.get_submodule(stack.name)
        # T5's first layer alone has a position bias: only what both have.
        layers[1].load_state_dict(layers[0].state_dict(), strict=False)
    groups = (Group(positions=(0, 1), merge="regmean", rank=2),)
    plan = SharingPlan(
        stacks=tuple(StackPlan(name=s.name, length=s.length, groups=groups) for s in find_stacks(model))
    )
    student = share(model, plan, calibration=texts(batch_for, kind), fit="sequential")
    torch.testing.assert_close(
        output(student, batch_for(kind)), output(model, batch_for(kind)), atol=1e-3, rtol=1e-3
    )


def alone(model):
    """Every position factorised by itself."""
    groups = tuple(Group(positions=(i,), method="basis", rank=4) for i in range(4))
    return SharingPlan(stacks=(StackPlan(name=find_stacks(model)[0].name, length=4, groups=groups),))


PLANS = {
    "basis": lambda model: make_plan(model, "basis", rank=8),
    "relaxed": lambda model: make_plan(model, "adjacent", unique=2, merge="regmean", rank=4),
    "alone": alone,
}


@pytest.mark.parametrize("name", PLANS)
def test_errors_pile_up_less(name, tiny, batch_for):
    """On the texts it was fitted on, and with weights large enough for errors to matter."""
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    plan, batches = PLANS[name](model), texts(batch_for, "llama", 12)
    errors = {}
    for way in ("inputs", "answer", "sequential"):
        student = share(model, plan, calibration=batches, fit=way)
        errors[way] = sum(float((output(student, b) - output(model, b)).square().mean()) for b in batches)
    assert errors["sequential"] < 0.97 * min(errors["inputs"], errors["answer"])


def test_biases_bring_every_sum_to_the_mean_of_the_original(tiny, batch_for):
    model, batches = tiny("bert"), texts(batch_for, "bert", 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)  # so that means are far from 0
    student = share(model, alone(model), calibration=batches, fit="sequential")
    plain = share(model, alone(model), calibration=batches, fit="answer")
    norms = [name for name, module in model.encoder.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    wanted, found, without = (
        mean_inputs(one.encoder, norms, one, batches) for one in (model, student, plain)
    )
    assert len(norms) == 8
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert (without - wanted).abs().max() > 5e-3


def mean_inputs(root, names, model, batches):
    """The mean row that each module reads over all tokens."""
    sums = dict.fromkeys(names, 0)
    hooks = [
        root.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: sums.update({name: sums[name] + args[0].flatten(0, 1).mean(0)})
        )
        for name in names
    ]
    for batch in batches:
        output(model, batch)
    for hook in hooks:
        hook.remove()
    return torch.stack([sums[name] / len(batches) for name in names])


def test_the_slopes_of_the_answer_say_where_errors_count(tiny, batch_for):
    """Where the answer looks at one direction of a map's output alone, that one is kept."""
    model, batches = tiny("bert"), texts(batch_for, "bert", 6)
    module = "encoder.layer.3.output.dense"
    seen = measure(model, batches)
    sharp = torch.full((16,), 1e-6, dtype=torch.float64)
    sharp[5] = 1.0
    groups = (Group(positions=(3,), parts=("output.dense.weight",), method="basis", rank=1),)
    plan = SharingPlan(stacks=(StackPlan(name="encoder.layer", length=4, groups=groups),))
    known = Moments(seen.inputs, seen.slopes | {module: sharp.diag()})
    student = share(model, plan, calibration=batches, fit="sequential", known=known)
    kept = student.get_submodule(module).weight[5]
    torch.testing.assert_close(kept, model.get_submodule(module).weight[5], atol=1e-3, rtol=1e-2)


def test_without_private_factors_to_fit_again_the_shared_ones_stay(tiny, batch_for, monkeypatch):
    """What a group shares is fitted once, when its first position is reached."""
    model, calls = tiny("bert"), []
    solve_one = sequential.solve_one
    monkeypatch.setattr(
        sequential, "solve_one", lambda job, *rest: calls.append(job.names) or solve_one(job, *rest)
    )
    share(model, make_plan(model, "basis", rank=4), calibration=texts(batch_for, "bert", 2), fit="sequential")
    assert len(calls) == len(set(calls)) == 12


def halved(model, part="output.dense.weight"):
    """Of the first layer, one map factorised; all the others stay whole."""
    groups = (Group(positions=(0,), parts=(part,), method="basis", rank=2),)
    return SharingPlan(stacks=(StackPlan(name=find_stacks(model)[0].name, length=4, groups=groups),))


def test_maps_that_stay_whole_make_up_for_the_others(tiny, batch_for):
    """Each by the step of least squares towards the original's outputs; what comes before any loss stays."""
    model, batches = tiny("bert"), texts(batch_for, "bert", 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    student = share(model, halved(model), calibration=batches, fit="sequential")
    now, then = dict(student.named_parameters()), dict(model.named_parameters())
    moved = {n for n in now.keys() & then.keys() if not torch.allclose(now[n], then[n], atol=1e-6)}
    maps = {
        f"{s.name}.{i}.{w.name}"
        for s in find_stacks(model)
        for i in (1, 2, 3)
        for w in s.layers[i]
        if w.factorable
    }
    assert maps <= moved
    assert not {name for name in moved if ".layer.0." in name and name.endswith("weight")}
    # the first of them, by hand
    module = "encoder.layer.1.attention.self.query"
    torch.testing.assert_close(
        now[f"{module}.weight"].double(),
        half_way(student, model, module, batches, centred=True),
        atol=1e-3,
        rtol=1e-2,
    )


def half_way(student, model, module, batches, *, centred):
    """From the original's map half of the way to least squares on what the finished student hands on."""
    rows, wanted = [], []
    for one, said in ((student, rows), (model, wanted)):
        hook = one.get_submodule(module).register_forward_hook(
            lambda _, args, out, said=said, one=one: said.append(args[0] if one is student else out)
        )
        with torch.no_grad():
            for batch in batches:
                output(one, batch)
        hook.remove()
    y, x = (torch.cat([r.flatten(0, 1) for r in said]).double() for said in (rows, wanted))
    if centred:
        y, x = y - y.mean(0), x - x.mean(0)
    ridge = sequential.RIDGE * (y.T @ y).diagonal().mean() * torch.eye(y.shape[1], dtype=torch.float64)
    own = model.get_submodule(module).weight.detach().double()
    best = own + torch.linalg.solve(y.T @ y + ridge, y.T @ (x - y @ own.T)).T
    return (own + best) / 2


def test_maps_are_fitted_to_the_keys_and_values_that_are_lent(tiny, batch_for):
    model, batches = tiny("llama"), texts(batch_for, "llama", 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    lent = Group(positions=(0, 1, 2), parts=("*k_proj*", "*v_proj*"), kv=True)
    low = Group(positions=(0,), parts=("*o_proj*",), method="basis", rank=4)
    plan = SharingPlan(stacks=(StackPlan(name="model.layers", length=4, groups=(lent, low)),))
    student = share(model, plan, calibration=batches, fit="sequential")
    module = "model.layers.2.mlp.gate_proj"
    wanted = half_way(student, model, module, batches, centred=False)
    torch.testing.assert_close(
        student.get_submodule(module).weight.detach().double(), wanted, atol=1e-3, rtol=1e-2
    )


@pytest.mark.parametrize("stack", ["encoder.block", "decoder.block"])
def test_stacks_that_the_plan_does_not_name_stay(stack, tiny, batch_for):
    model = tiny("t5")
    plan = make_plan(model, "basis", rank=4, stack=stack, parts=("ffn",))
    student = share(model, plan, calibration=texts(batch_for, "t5", 3), fit="sequential")
    other = {"encoder.block": "decoder", "decoder.block": "encoder"}[stack]
    before = dict(getattr(model, other).named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in getattr(student, other).named_parameters())


def test_a_map_whose_bias_is_shared_takes_up_the_mean_itself(tiny, batch_for):
    """The best matrix alone, about zero, not about a mean that no bias of its own makes up for."""
    model, batches = tiny("bert"), texts(batch_for, "bert", 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    one, tied = halved(model).stacks[0].groups[0], Group(positions=(0, 1, 2, 3), parts=("norm",))
    plan = SharingPlan(stacks=(StackPlan(name="encoder.layer", length=4, groups=(one, tied)),))
    assert any(w.part == "norm" and w.name.endswith("query.bias") for w in find_stacks(model)[0].layers[0])
    errors = {}
    for way in ("answer", "sequential"):
        student = share(model, plan, calibration=batches, fit=way)
        errors[way] = sum(float((output(student, b) - output(model, b)).square().mean()) for b in batches)
    assert errors["sequential"] < errors["answer"]


def test_experts_whose_tokens_change_are_no_obstacle():
    import transformers

    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        d_model=16, d_kv=8, d_ff=32, num_layers=4, num_decoder_layers=4, num_heads=2, num_experts=3, vocab_size=25,
        num_sparse_encoder_layers=4, num_sparse_decoder_layers=4, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    batches = [
        {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
        for ids in torch.randint(5, 24, (3, 4, 9), generator=torch.Generator().manual_seed(1))
    ]
    group = Group(positions=(1,), parts=("attention",), method="basis", rank=4)
    plan = SharingPlan(stacks=(StackPlan(name="encoder.block", length=4, groups=(group,)),))
    student = share(model, plan, calibration=batches, fit="sequential")
    verify(student, plan)
    assert output(student, batches[0]).isfinite().all()


def test_an_expert_that_the_student_never_asks_stays_as_it_is(tiny, batch_for):
    model = tiny("bert")
    for layer in model.encoder.layer:
        layer.idle = torch.nn.Linear(4, 4)
    student = share(model, halved(model), calibration=texts(batch_for, "bert", 2), fit="sequential")
    assert all(
        map(torch.equal, student.encoder.layer[2].idle.parameters(), model.encoder.layer[2].idle.parameters())
    )


def test_same_batches_same_bits(tiny, batch_for):
    model = tiny("gpt2")
    plan = make_plan(model, "basis", rank=4)
    one, two = (
        share(model, plan, calibration=texts(batch_for, "gpt2", 2), fit="sequential") for _ in range(2)
    )
    assert same(one, two)


def test_without_calibration_it_is_refused(tiny):
    model = tiny("bert")
    with pytest.raises(PlanError, match="calibration"):
        share(model, make_plan(model, "basis", rank=4), fit="sequential")


def test_a_position_that_borrows_from_outside_the_group_gets_those_weights(tiny):
    model = tiny("bert")
    exact = [layer.output.dense.weight.clone() for layer in model.encoder.layer]
    groups = (
        Group(positions=(0, 1), merge="pick", source=2),
        Group(positions=(2, 3), merge="pick", source=0),
    )
    plan = SharingPlan(stacks=(StackPlan(name="encoder.layer", length=4, groups=groups),))
    layers = share(model, plan).encoder.layer
    assert torch.equal(layers[1].output.dense.weight, exact[2])
    assert torch.equal(layers[3].output.dense.weight, exact[0])


def test_stepwise_takes_evenly_spaced_layers(tiny):
    model = tiny("bert")
    exact = [layer.output.dense.weight.clone() for layer in model.encoder.layer]
    layers = share(model, make_plan(model, "cycle", unique=2, merge="stepwise")).encoder.layer
    assert [torch.equal(layers[i].output.dense.weight, exact[j]) for i, j in enumerate((0, 3, 0, 3))] == [
        True
    ] * 4
