"""The laws of sharing, for every architecture and every kind of plan."""

import copy
import io

import pytest
import torch
from torch import nn

import layershare
from laws import PRESETS, SHARED, answer, gates_only, loss, mixed, output, plan_for, same
from layershare import count, find_stacks, make_plan, plan_of, predict, retie, share, unshare, verify
from layershare.errors import DataError, ModelError, PlanError, TieError
from layershare.linear import FactoredLinear, orders_of
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing.layout import resolve
from layershare.sharing.statistics import collect
from layershare.sharing.tie import layout_of


def shared(model, name, batch):
    plan = plan_for(model, name)
    return share(model, plan, calibration=[batch]), plan


def one(model, *groups: Group, **more) -> SharingPlan:
    """A plan for the first stack."""
    stack = find_stacks(model)[0]
    return SharingPlan(stacks=(StackPlan(name=stack.name, length=stack.length, groups=groups, **more),))


def ties(model) -> list[tuple[str, ...]]:
    return list(layout_of(model, plan_of(model)).ties)


def are_one(model) -> bool:
    return all(
        model.get_parameter(owner) is model.get_parameter(member)
        for owner, *rest in ties(model)
        for member in rest
    )


# --- the plan and the model agree


def test_the_identity_plan_changes_no_bit(tiny, batch_for, kind):
    model, batch = tiny(kind), batch_for(kind)
    alone = one(model, *(Group(positions=(p,)) for p in range(4)))
    for plan in (SharingPlan(), alone, make_plan(model, "sequence", unique=4)):
        twin = share(model, plan)
        assert twin is not model
        assert same(twin, model)
        assert torch.equal(output(twin, batch), output(model, batch))
        assert plan_of(twin) is None


@pytest.mark.parametrize("name", [*PRESETS, "mixed"])
def test_counts_are_as_predicted(tiny, batch_for, kind, name):
    model, batch = tiny(kind), batch_for(kind)
    before, cost = count(model), predict(find_stacks(model), plan_for(model, name))
    student, plan = shared(model, name, batch)
    after = verify(student, plan).counts
    assert (cost.layer_effective, cost.layer_bytes_before) == (before.layer_unique, 4 * before.layer_unique)
    assert (cost.layer_unique, cost.layer_bytes) == (after.layer_unique, 4 * after.layer_unique)
    assert after.unique - after.layer_unique == before.unique - before.layer_unique
    assert after.bytes_unique == 4 * after.unique
    assert after.layer_unique < before.layer_unique
    pivots = sum(order.numel() for _, order in orders_of(student))
    assert after.unique == sum(p.numel() for p in student.parameters()) + pivots
    assert after.effective == after.unique + sum(
        student.get_parameter(name).numel() for _, *rest in layout_of(student, plan).ties for name in rest
    ) + (before.effective - before.unique)


@pytest.mark.parametrize("name", SHARED)
def test_members_are_one_object_before_and_after_a_step(tiny, batch_for, kind, name):
    student, _ = shared(tiny(kind), name, batch_for(kind))
    assert are_one(student)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    loss(student, batch_for(kind)).backward()
    optimizer.step()
    assert are_one(student)
    verify(student)
    moved = [not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("name", SHARED)
def test_private_parameters_stay_private(tiny, batch_for, kind, name):
    student, _ = shared(tiny(kind), name, batch_for(kind))
    together = {member: owner for owner, *rest in ties(student) for member in rest}
    together |= {name: next(n for n, p in student.named_parameters() if p is student.get_parameter(name))
                 for name in student.all_tied_weights_keys}  # fmt: skip
    every = dict(student.named_parameters(remove_duplicate=False))
    assert len({id(p) for p in every.values()}) == len(every) - len(together)


def test_the_shared_gradient_is_the_sum_of_the_untied_ones(tiny, batch_for, kind):
    model, batch = tiny(kind).double(), batch_for(kind)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    student = share(model, make_plan(model, "cycle", unique=2, parts="*"))
    free = unshare(student)
    loss(student, batch).backward()
    loss(free, batch).backward()
    assert ties(student)
    for names in ties(student):
        gradients = [free.get_parameter(name).grad for name in names]
        expected = torch.stack([g for g in gradients if g is not None]).sum(0)
        torch.testing.assert_close(student.get_parameter(names[0]).grad, expected)


@pytest.mark.parametrize("name", SHARED)
def test_unshare_undoes_share(tiny, batch_for, kind, name):
    batch = batch_for(kind)
    student, plan = shared(tiny(kind), name, batch)
    before = output(student, batch)
    free = unshare(student)
    torch.testing.assert_close(output(free, batch), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(output(student, batch), before)
    verify(student, plan)
    assert not any(isinstance(module, FactoredLinear) for module in free.modules())
    counts = count(free)
    assert counts.layer_unique == counts.layer_effective
    layers = [p for stack in find_stacks(free) for p in free.get_submodule(stack.name).parameters()]
    assert len({parameter.data_ptr() for parameter in layers}) == len(layers)
    if not any(stack.gates for stack in plan.stacks):
        assert plan_of(free) is None
        assert not hasattr(free.config, "quantization_config")
        assert not hasattr(free.config, "transformers_weights")


@pytest.mark.parametrize("name", ["everything", "all"])
def test_unsharing_plain_ties_is_exact(tiny, batch_for, kind, name):
    student, _ = shared(tiny(kind), name, batch_for(kind))
    assert torch.equal(output(unshare(student), batch_for(kind)), output(student, batch_for(kind)))


def test_unsharing_an_ordinary_model_copies_it(tiny):
    model = tiny("bert")
    assert same(unshare(model), model)
    assert unshare(model) is not model


@pytest.mark.parametrize("order", [("norm", "attention"), ("attention", "norm")])
def test_unsharing_does_not_depend_on_the_order_of_groups(tiny, order):
    model = tiny("gpt2")
    plan = one(model, *(Group(positions=(0, 1), parts=(p,), rank=2 * (p == "attention")) for p in order))
    counts = count(unshare(share(model, plan)))
    assert counts.layer_unique == counts.layer_effective == count(model).layer_unique


@pytest.mark.parametrize("name", [*PRESETS, "mixed"])
def test_the_original_is_untouched(tiny, batch_for, kind, name):
    model, batch = tiny(kind).train(), batch_for(kind)
    config, before = model.config.to_dict(), copy.deepcopy(model.state_dict())
    student, _ = shared(model, name, batch)
    assert student.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert model.config.to_dict() == config
    assert plan_of(model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- values


def values(model, name) -> list[torch.Tensor]:
    return [layer.get_parameter(name).detach() for layer in model.get_submodule(find_stacks(model)[0].name)]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (dict(merge="first"), lambda w: w[0]),
        (dict(merge="last"), lambda w: w[3]),
        (dict(merge="pick", source=2), lambda w: w[2]),
        (dict(merge="mean"), lambda w: torch.stack([w[0], w[2], w[3]]).mean(0)),
    ],
)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_merged_values(tiny, kind, more, expected):
    model = tiny(kind)
    name = {"bert": "intermediate.dense.weight", "gpt2": "mlp.c_fc.weight"}[kind]
    before, after = (
        values(m, name)
        for m in (model, share(model, one(model, Group(positions=(0, 2, 3), parts=("ffn",), **more))))
    )
    torch.testing.assert_close(after[0], expected(before))
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("group", [dict(rank=15), dict(method="basis", rank=15, side="input"),
                                   dict(method="basis", rank=15, side="output")])  # fmt: skip
def test_nearly_full_rank_is_nearly_exact(tiny, batch_for, kind, calibrated, group):
    """Attention is 16 x 16 (GPT-2: 16 x 48): all but the last of the directions are there."""
    model, batch = tiny(kind), batch_for(kind)
    positions = (0, 1) if group.get("method") != "basis" else (0,)
    part = {"bert": "attention.output.dense.weight", "gpt2": "attn.c_proj.weight"}[kind]
    plan = one(model, Group(positions=positions, parts=(part,), **group))
    student = share(model, plan, calibration=[batch] if calibrated else None)
    module = part.removesuffix(".weight")
    for position in positions:
        before, after = (
            m.get_submodule(f"{find_stacks(m)[0].name}.{position}.{module}").weight for m in (model, student)
        )
        assert torch.linalg.matrix_rank((before - after).double(), atol=1e-6) <= 1
        assert not torch.equal(before, after)
    # with the last direction missing, most of the function is there
    assert (output(student, batch) - output(model, batch)).abs().max() < 0.1 * output(
        model, batch
    ).abs().max()


def test_corrections_bring_every_position_nearer_to_its_own_weight(tiny, kind):
    model = tiny(kind)
    name = next(w.name for w in find_stacks(model)[0].layers[1] if w.part == "ffn")
    away = []
    for rank in (0, 4, 8, 15):
        student = share(model, one(model, Group(positions=(1, 2, 3), parts=(name,), rank=rank)))
        module = f"{find_stacks(model)[0].name}.{{}}.{name.removesuffix('.weight')}".format
        pairs = [(m := module(p), model.get_submodule(m).weight) for p in (1, 2, 3)]
        away.append(sum((student.get_submodule(m).weight - w).norm().item() for m, w in pairs))
    assert away == sorted(away, reverse=True)
    assert away[-1] < 0.2 * away[0]


@pytest.mark.parametrize("group", [dict(), dict(method="basis"), dict(method="basis", side="output")])
def test_activations_decide_where_the_error_lies(tiny, batch_for, group):
    model, batch = tiny("bert"), batch_for("bert")
    plan = one(model, Group(positions=(0, 1), parts=("attention.self.*.weight",), rank=2, **group))
    blind, seeing = share(model, plan), share(model, plan, calibration=[batch])
    assert (seeing.config.quantization_config.made, blind.config.quantization_config.made) == (
        {"whitened": True, "texts": 2},
        {"whitened": False},
    )
    names = [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    grams = collect(model, names, [batch])
    error, distance = dict.fromkeys((blind, seeing), 0.0), dict.fromkeys((blind, seeing), 0.0)
    for student in (blind, seeing):
        for name in names:
            rest = model.get_submodule(name).weight - student.get_submodule(name).weight
            error[student] += torch.einsum("oi,ij,oj->", rest, grams[name], rest).item()
            distance[student] += rest.square().sum().item()
    assert error[seeing] < error[blind]
    assert distance[blind] < distance[seeing]


def test_regmean_uses_the_activations(tiny, batch_for):
    model, batch = tiny("bert"), batch_for("bert")
    names = [f"encoder.layer.{i}.output.dense" for i in (0, 1)]
    plan = one(model, Group(positions=(0, 1), parts=("output.dense.weight",), merge="regmean"))
    found = share(model, plan, calibration=[batch]).get_submodule(names[0]).weight
    grams = collect(model, names, [batch])
    errors = []
    for candidate in (found, sum(model.get_submodule(n).weight for n in names) / 2):
        rest = [(candidate - model.get_submodule(n).weight, grams[n]) for n in names]
        errors.append(sum(torch.einsum("oi,ij,oj->", r, g, r).item() for r, g in rest))
    assert errors[0] < errors[1]


# --- statistics


def test_second_moments_leave_padding_out(tiny):
    model = tiny("bert")
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 0]])
    mask = (ids > 0).long()
    name, seen = "encoder.layer.0.attention.self.query", []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    grams = collect(model.train(), [name], [{"input_ids": ids, "attention_mask": mask}] * 2)
    assert model.training
    rows = seen[0][mask.bool()]
    torch.testing.assert_close(grams[name], rows.T @ rows / 7)
    whole = collect(model, [name], [{"input_ids": ids}])[name]
    every = seen[-1].flatten(0, 1)
    torch.testing.assert_close(whole, every.T @ every / 10)


@pytest.mark.parametrize(
    ("batches", "words"), [([], "has no batch"), ([{"input_ids": torch.ones(1, 2).long()}], "head")]
)
def test_modules_that_see_nothing_are_named(tiny, batches, words):
    model = tiny("bert")
    model.head = nn.Linear(2, 2)
    with pytest.raises(DataError, match=words):
        collect(model, ["head"] if batches else ["encoder.layer.0.output.dense"], batches)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("weight", "named"), [("0.attention.self.value", "reads"), ("3.output.dense", "weight")]
)
def test_numbers_that_are_not_finite_are_refused(tiny, batch_for, weight, named):
    model = tiny("bert")
    with torch.no_grad():
        model.get_submodule(f"encoder.layer.{weight}").weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=named):
        collect(model, ["encoder.layer.3.output.dense"], [batch_for("bert")])


# --- what does not fit


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: one_of(length=5), "stack 'encoder.layer' has 4 layers, the plan is for 5"),
        (lambda: one_of(name="encoder.layr"), "no stack 'encoder.layr'. Did you mean 'encoder.layer'?"),
        (lambda: one_of(groups=[Group(positions=(0, 1), parts=("fnn",))]), "part 'fnn' matches no parameter"),
        (lambda: one_of(groups=[Group(positions=(0, 1), parts=("fnn",))]), "Did you mean 'ffn'?"),
        (lambda: one_of(groups=[Group(positions=(0, 1), parts=("*.qery.*",))]), "'*.qery.*' matches no"),
        (
            lambda: one_of(
                groups=[Group(positions=(0, 1), parts=("ffn",)), Group(positions=(1, 2), parts=("output*",))]
            ),
            "encoder.layer.1.output.dense.weight is in two groups: ffn of positions [0, 1]",
        ),
        (lambda: one_of(groups=[Group(positions=(0, 1), parts=("ffn",), rank=16)]), "rank 16 is not below"),
        (lambda: one_of(groups=[Group(positions=(0, 1), parts=("ffn",), rank=16)]), "at most 15"),
        (lambda: one_of(groups=[Group(positions=(0, 1), merge="regmean")]), "'regmean' of encoder.layer.0.attention"),
        (lambda: SharingPlan(stacks=one_of().stacks + one_of(name="bert.encoder.layer").stacks), "planned twice"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit(tiny, make, words):
    with pytest.raises(PlanError) as caught:
        share(tiny("bert"), make())
    assert words in str(caught.value)


def one_of(**more) -> SharingPlan:
    return SharingPlan(stacks=(StackPlan(**{"name": "encoder.layer", "length": 4} | more),))


def test_sharing_twice_is_refused(tiny):
    model = tiny("bert")
    student = share(model, make_plan(model, "all"))
    with pytest.raises(PlanError, match="BertModel is shared already"):
        share(student, make_plan(model, "all"))


def test_what_cannot_be_factored_is_noted(tiny):
    encoder, _ = find_stacks(tiny("t5"))
    basis = Group(positions=(0, 1), parts=("attention",), method="basis", rank=2)
    tied = Group(positions=(2, 3), parts=("*",), rank=2)
    layout = resolve(
        [encoder], SharingPlan(stacks=(StackPlan(name=encoder.name, length=4, groups=(basis, tied)),))
    )
    assert any("relative_attention_bias" in note and "stays private" in note for note in layout.notes)
    assert any("layer_norm" in note and "without a private correction" in note for note in layout.notes)
    assert not any("relative_attention_bias" in name for job in layout.jobs for name in job.names)


def test_a_parameter_that_not_all_positions_have_is_shared_among_those_that_do(tiny):
    model = tiny("t5")
    layout = layout_of(model, one(model, Group(positions=(0, 1, 2), merge="pick", source=1)))
    assert all(len(tie) == 3 for tie in layout.ties)
    assert any("positions [0] only" in note for note in layout.notes)
    assert any("does not stand like this at position 1" in note for note in layout.notes)


def test_a_prefix_of_the_stack_may_be_missing(tiny, batch_for):
    model = tiny("gpt2")
    plan = make_plan(model, "all")
    assert plan.stacks[0].name == "transformer.h"
    verify(share(model.transformer, plan), plan)


# --- accounts


def test_the_account(tiny):
    model = tiny("bert")
    account = verify(share(model, mixed(model), calibration=[{"input_ids": torch.tensor([[5, 6]])}]))
    # ten vectors and four attention bases at positions 0 and 1, two ffn factors at 1 and 3
    assert (account.tied, account.uses, account.factored, account.gated) == (16, 32, 16, 2)
    assert "16 shared parameters serve 32 places; 16 factored maps, 2 gates." in str(account)


@pytest.mark.parametrize("call", [verify, retie])
def test_a_model_without_a_plan_has_nothing_to_verify(tiny, call):
    with pytest.raises(TieError, match="BertModel carries no sharing plan"):
        call(tiny("bert"))


# --- what other tools do to a model


@pytest.mark.parametrize("name", ["adjacent", "gated", "mixed"])
@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_keeps_the_ties(tiny, batch_for, kind, name, to):
    student, plan = shared(tiny(kind), name, batch_for(kind))
    verify(student.to(to), plan)
    assert {parameter.dtype for parameter in student.parameters()} == {to}


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("travel", [copied, pickled])
@pytest.mark.parametrize("name", ["adjacent", "mixed"])
def test_copies_are_shared_as_well(tiny, batch_for, kind, name, travel):
    batch = batch_for(kind)
    student, plan = shared(tiny(kind), name, batch)
    twin = travel(student)
    assert verify(twin) == verify(student)
    assert plan_of(twin) == plan
    assert torch.equal(output(twin, batch), output(student, batch))
    own = {id(parameter) for parameter in student.parameters()}
    assert not any(id(parameter) in own for parameter in twin.parameters())


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_new_tokens_keep_the_ties(tiny, batch_for, kind):
    batch = batch_for(kind)
    student, plan = shared(tiny(kind), "mixed", batch)
    before = student.get_submodule(find_stacks(student)[0].name).state_dict()
    student.resize_token_embeddings(40)
    verify(student, plan)
    after = student.get_submodule(find_stacks(student)[0].name).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert student.get_input_embeddings().num_embeddings == 40


@pytest.mark.parametrize("name", ["adjacent", "mixed"])
def test_a_state_dict_goes_in_and_out(tiny, batch_for, kind, name):
    batch = batch_for(kind)
    student, plan = shared(tiny(kind), name, batch)
    other, _ = shared(tiny(kind, seed=1), name, batch)
    assert not torch.equal(output(other, batch), output(student, batch))
    other.load_state_dict(student.state_dict(), strict=True)
    verify(other, plan)
    assert torch.equal(output(other, batch), output(student, batch))


@pytest.mark.parametrize("name", ["adjacent", "mixed"])
def test_untied_models_are_found_and_mended(tiny, batch_for, kind, name):
    batch = batch_for(kind)
    student, _ = shared(tiny(kind), name, batch)
    before = output(student, batch)
    student.load_state_dict({n: v.clone() for n, v in student.state_dict().items()}, strict=True, assign=True)
    broken = ties(student)[0][1]
    with pytest.raises(TieError, match=f"{broken}.*came apart.*retie"):
        verify(student)
    retie(student)
    student.tie_weights()
    assert are_one(student)
    assert torch.equal(output(student, batch), before)


def test_every_broken_tie_is_found(tiny, batch_for):
    for number in range(len(ties(shared(tiny("bert"), "mixed", batch_for("bert"))[0]))):
        student, _ = shared(tiny("bert"), "mixed", batch_for("bert"))
        name = ties(student)[number][1]
        module, _, leaf = name.rpartition(".")
        setattr(
            student.get_submodule(module), leaf, nn.Parameter(student.get_parameter(name).detach().clone())
        )
        with pytest.raises(TieError, match=name):
            verify(student)


def test_lost_factors_are_found(tiny):
    model = tiny("bert")
    student = share(model, one(model, Group(positions=(1,), parts=("ffn",), method="basis", rank=2)))
    name = "encoder.layer.1.output.dense"
    student.set_submodule(name, student.get_submodule(name).dense())
    with pytest.raises(TieError, match=name):
        verify(student)


@pytest.mark.parametrize("name", ["gated", "mixed"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, batch_for, kind, name):
    batch = batch_for(kind)
    student, _ = shared(tiny(kind), name, batch)
    student.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            student.activation_checkpointing_enable()
        student.zero_grad()
        torch.manual_seed(0)
        loss(student, batch).backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("name", ["cycle", "basis", "mixed", "gates"])
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached(tiny, batch_for, kind, name, beams):
    model, batch = tiny(kind), batch_for(kind)
    if name == "gates":
        student = share(model, gates_only(model, 1, 0.5, 0, 1.5))
    else:
        student, _ = shared(model, name, batch)
    with torch.no_grad():  # spread the logits, so that no two are nearly equal
        student.get_output_embeddings().weight.mul_(20)
    how = dict(max_new_tokens=6, min_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=0)
    ids = batch["input_ids"]
    cached, plain = (
        student.generate(ids, attention_mask=torch.ones_like(ids), use_cache=c, **how) for c in (True, False)
    )
    assert torch.equal(cached, plain)
    assert cached.shape[1] >= 7


def test_hidden_states_and_attentions_come_from_every_position(tiny, batch_for):
    student, _ = shared(tiny("bert"), "all", batch_for("bert"))
    student.set_attn_implementation("eager")
    with torch.no_grad():
        out = student(**batch_for("bert"), output_hidden_states=True, output_attentions=True)
    assert (len(out.hidden_states), len(out.attentions)) == (5, 4)
    assert torch.equal(out.hidden_states[-1], answer(out))


def test_the_public_functions_are_those_of_the_rooms():
    assert layershare.share is share
    assert layershare.count is count
