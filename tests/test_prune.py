"""Pruning by structure: counts in closed form, masked equals cut, ties hold, what is saved loads the same."""

import copy

import pytest
import torch
import transformers

import layershare
from layershare.errors import DataError, LayershareError, ModelError, OptionError
from layershare.linear import PivotedLinear
from layershare.measure.cost import flops
from layershare.plan import Gate, Group, SharingPlan, StackPlan
from layershare.prune import PruneConfig, account, matching_loss, prune
from layershare.prune.cutting import Choice, cut, zero
from layershare.prune.folder import prune_folder
from layershare.prune.importance import block_influence, label_loss, of_inputs, of_positions
from layershare.prune.structured import cells_of, choose, find_blocks, importance
from layershare.sharing.gate import add_gate, remove_gate
from layershare.sharing.pivots import without_pivots

LLAMA = dict(num_attention_heads=4, num_key_value_heads=2)
INNER = {"bert": 32, "gpt2": 64, "llama": 32, "t5": 32, "vit": 32}
MAPS = {"bert": 2, "gpt2": 2, "llama": 3, "t5": 2, "vit": 2}  # maps of an FFN
BIASED = {"bert", "gpt2", "vit"}


def output(model, batch):
    with torch.no_grad():
        found = model(**batch)
    return found.logits if "logits" in found else found.last_hidden_state


def plans(model):
    """All that sharing can do: ties, a private correction, a basis, a gate."""
    stack = layershare.find_stacks(model)[0]
    groups = (
        Group(positions=(0, 1), parts=("ffn",), rank=2),
        Group(positions=(2, 3), parts=("ffn",), method="basis", rank=4),
        Group(positions=(0, 1, 3), parts=("attention",)),
    )
    one = StackPlan(name=stack.name, length=4, groups=groups, gates=(Gate(position=2, value=0.5),))
    return {
        "tied": layershare.make_plan(model, "cycle", unique=2),
        "mixed": SharingPlan(stacks=(one,)),
        "basis-output": layershare.make_plan(model, "basis", budget=0.6),
        "pivoted": SharingPlan(stacks=(pivoted(stack),)),
    }


def pivoted(stack):
    groups = (Group(positions=(p,), method="basis", rank=4, pivots=True) for p in range(stack.length))
    return StackPlan(name=stack.name, length=stack.length, groups=tuple(groups))


def exact_loss(model, batch):
    """In float64, which transformers' own losses are not."""
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def reloaded(model, folder):
    model.save_pretrained(folder)
    return getattr(transformers, type(model).__name__).from_pretrained(folder).eval()


def test_neurons_are_cut_everywhere_and_the_model_loads_and_is_faster(kind, tiny, batch_for, tmp_path):
    model, batch = tiny(kind), batch_for(kind)
    before = copy.deepcopy(model.state_dict())
    pruned = prune(model, PruneConfig(what="neurons", amount=0.25))
    layers = sum(stack.length for stack in layershare.find_stacks(model))
    each = INNER[kind] // 4 * (MAPS[kind] * 16 + (kind in BIASED))
    assert layershare.count(model).unique - layershare.count(pruned).unique == layers * each
    assert flops(pruned, batch) < flops(model, batch)
    again = reloaded(pruned, tmp_path)
    assert torch.equal(output(again, batch), output(pruned, batch))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert account(model, pruned).unique == layershare.count(pruned).unique
    masked = prune(model, PruneConfig(what="neurons", amount=0.25, keep_shape=True))
    torch.testing.assert_close(output(masked, batch), output(pruned, batch), rtol=1e-4, atol=1e-6)
    assert flops(masked, batch) == flops(model, batch)


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_heads_are_cut_where_the_config_can_say_so(kind, tiny, batch_for, tmp_path):
    model, batch = tiny(kind, **(LLAMA if kind == "llama" else {})), batch_for(kind)
    if kind == "t5":  # position biases that differ between heads, in the first position for all
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "relative_attention_bias" in name:
                    parameter.copy_(torch.randn(parameter.shape))
    pruned = prune(model, PruneConfig(what="heads", amount=1))
    masked = prune(model, PruneConfig(what="heads", amount=1, keep_shape=True))
    if kind != "t5":  # there a mask may choose freely in each position
        torch.testing.assert_close(output(masked, batch), output(pruned, batch), rtol=1e-4, atol=1e-6)
    assert flops(pruned, batch) < flops(model, batch) == flops(masked, batch)
    assert torch.equal(output(reloaded(pruned, tmp_path), batch), output(pruned, batch))
    gone = {
        "llama": 4 * 2 * (2 * 4 * 16 + 4 * 16),
        "t5": 12 * 4 * 8 * 16 + 2 * 32,
        "vit": 4 * (4 * 8 * 16 + 3 * 8),
    }[kind]
    assert layershare.count(model).unique - layershare.count(pruned).unique == gone
    if kind == "llama":
        ids = batch["input_ids"]
        plain, cached = (
            pruned.generate(ids, max_new_tokens=5, do_sample=False, use_cache=c) for c in (False, True)
        )
        assert torch.equal(plain, cached)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_heads_that_the_config_cannot_express_are_refused_and_can_be_zeroed(kind, tiny, batch_for):
    model, batch = tiny(kind), batch_for(kind)
    with pytest.raises(ModelError, match="keep_shape"):
        prune(model, PruneConfig(what="heads", amount=1))
    masked = prune(model, PruneConfig(what="heads", amount=0.5, keep_shape=True, by="activation"), [batch])
    reader = "encoder.layer.0.attention.output.dense" if kind == "bert" else "transformer.h.0.attn.c_proj"
    weight = masked.get_submodule(reader).weight
    weight = weight.T if kind == "gpt2" else weight
    assert [bool((half == 0).all()) for half in weight.split(8, dim=1)].count(True) == 1


def test_a_fraction_of_heads_falls_to_what_the_config_allows_and_a_number_is_told(tiny):
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=8)
    assert prune(model, PruneConfig(what="heads", amount=0.7)).config.num_attention_heads == 4
    with pytest.raises(ModelError, match="4, 6, 7 of 8"):
        prune(model, PruneConfig(what="heads", amount=5))


def test_fused_maps_are_understood(tiny):
    config = transformers.Phi3Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        vocab_size=32, pad_token_id=0, head_dim=4,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    for what in ("neurons", "heads"):
        pruned = prune(model, PruneConfig(what=what, amount=0.5))
        masked = prune(model, PruneConfig(what=what, amount=0.5, keep_shape=True))
        torch.testing.assert_close(pruned(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["tied", "mixed", "basis-output"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_ties_hold_before_during_and_after(kind, name, tiny, batch_for, tmp_path):
    model, batch = tiny(kind), batch_for(kind)
    student = layershare.share(model, plans(model)[name])
    tied = layershare.verify(student).tied
    pruned = prune(student, PruneConfig(what="neurons", amount=0.5))
    assert layershare.verify(pruned).tied == tied == layershare.verify(student).tied
    blocks = find_blocks(student, layershare.find_stacks(student), "neurons", batch)
    masked = zero(student, the_choice(student, "neurons", batch))
    torch.testing.assert_close(output(masked, batch), output(pruned, batch), rtol=1e-4, atol=1e-6)
    assert len(cells_of(student, blocks, {})) < len(blocks)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=1e-2)
    output_ = pruned(**batch)
    next(iter(output_.values())).square().mean().backward()
    optimizer.step()
    assert layershare.verify(pruned).tied == tied
    assert torch.equal(output(reloaded(pruned, tmp_path), batch), output(pruned, batch))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_pivoted_maps_are_cut_as_plain_ones_and_have_pivots_again(kind, tiny, batch_for, tmp_path):
    model, batch = tiny(kind), batch_for(kind)
    student = layershare.share(model, plans(model)["pivoted"])
    config = PruneConfig(what="neurons", amount=0.5)
    pruned = prune(student, config)
    plain = prune(without_pivots(student), config)
    torch.testing.assert_close(output(pruned, batch), output(plain, batch), rtol=1e-4, atol=1e-6)
    saved = sum(m.rank**2 - m.in_features for m in pruned.modules() if isinstance(m, PivotedLinear))
    assert layershare.count(plain).unique - layershare.count(pruned).unique == saved
    layershare.verify(pruned)
    assert torch.equal(output(reloaded(pruned, tmp_path), batch), output(pruned, batch))
    masked = prune(student, PruneConfig(what="neurons", amount=0.5, keep_shape=True))
    torch.testing.assert_close(output(masked, batch), output(pruned, batch), rtol=1e-4, atol=1e-6)


def the_choice(model, what, batch) -> Choice:
    stacks = layershare.find_stacks(model)
    return choose(model, PruneConfig(what=what, amount=0.5), stacks, [batch], label_loss)[0]


def test_heads_of_a_shared_model(tiny, batch_for, tmp_path):
    model, batch = tiny("llama", **LLAMA), batch_for("llama")
    student = layershare.share(model, layershare.make_plan(model, "all", unique=1))
    pruned = prune(student, PruneConfig(what="heads", amount=1, by="activation"), [batch])
    assert layershare.verify(pruned).tied == layershare.verify(student).tied
    layers = pruned.model.layers
    assert layers[0].self_attn.q_proj.weight is layers[3].self_attn.q_proj.weight
    assert layers[0].self_attn.q_proj.weight.shape == (8, 16)
    assert torch.equal(output(reloaded(pruned, tmp_path), batch), output(pruned, batch))


@pytest.mark.parametrize("by", ["magnitude", "activation", "taylor"])
def test_a_shared_neuron_has_the_sum_of_the_importances_of_its_positions(by, tiny, batch_for):
    model, batch = tiny("llama"), batch_for("llama")
    batch["labels"] = batch["input_ids"]
    student = layershare.share(model, layershare.make_plan(model, "all", unique=1))
    blocks = find_blocks(student, layershare.find_stacks(student), "neurons", batch)
    scores = importance(student, blocks, by, [batch], label_loss)
    total = sum(scores[f"model.layers.{i}.mlp.down_proj"] for i in range(4))
    kept = total.argsort(stable=True)[8:].sort().values
    pruned = prune(student, PruneConfig(what="neurons", amount=8, by=by), [batch])
    wanted = student.model.layers[0].mlp.down_proj.weight[:, kept]
    assert torch.equal(pruned.model.layers[2].mlp.down_proj.weight, wanted)


def test_taylor_is_the_slope_of_the_loss_along_a_gate_on_the_neuron(tiny, batch_for):
    model, batch = tiny("gpt2").double(), batch_for("gpt2")
    batch["labels"] = batch["input_ids"]
    name, step = "transformer.h.1.mlp.c_proj", 1e-5
    slopes = of_inputs(model, [name], "taylor", [batch], exact_loss)[name][0]
    weight = model.get_submodule(name).weight.data
    for j in (0, 7, 31):
        row = weight[j].clone()
        values = []
        for gate in (1 + step, 1 - step):
            weight[j] = row * gate
            values.append(float(exact_loss(model, batch).detach()))
        weight[j] = row
        assert float(slopes[j]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)


def test_taylor_of_a_position_is_the_slope_along_its_gate(tiny, batch_for):
    model, batch = tiny("bert").double(), batch_for("bert")
    loss = matching_loss(tiny("bert", seed=1).double())
    found = of_positions(model, ["encoder.layer.2"], "taylor", [batch], loss)["encoder.layer.2"]
    layer, values = model.encoder.layer[2], []
    for gate in (1 + 1e-5, 1 - 1e-5):
        add_gate(layer, gate)
        values.append(float(loss(model, batch).detach()))
        remove_gate(layer)
    assert found == pytest.approx(abs(values[0] - values[1]) / 2e-5, rel=1e-4)


def test_activation_and_influence_by_hand_and_padding_does_not_count(tiny, batch_for):
    model, batch = tiny("bert"), batch_for("bert")
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    found = of_positions(model, ["encoder.layer.1"], "influence", [batch], label_loss)["encoder.layer.1"]
    assert found == pytest.approx(float(block_influence(states[1], states[2])[real].mean()), rel=1e-5)
    seen = []
    reader = model.encoder.layer[1].output.dense
    handle = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch)
    handle.remove()
    squares = of_inputs(model, ["encoder.layer.1.output.dense"], "activation", [batch], label_loss)
    wanted = seen[0].detach()[real].double().square().mean(0)
    torch.testing.assert_close(squares["encoder.layer.1.output.dense"], wanted)


def test_measuring_leaves_the_model_as_it_was(tiny, batch_for):
    model, batch = tiny("llama").train(), batch_for("llama")
    batch["labels"] = batch["input_ids"]
    model.model.embed_tokens.weight.requires_grad_(False)
    prune(model, PruneConfig(what="neurons", amount=0.5, by="taylor"), [batch])
    assert model.training
    assert not model.model.embed_tokens.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("by", ["magnitude", "activation", "influence", "taylor"])
def test_positions_are_dropped(by, kind, tiny, batch_for, tmp_path):
    model, batch = tiny(kind), batch_for(kind)
    pruned = prune(
        model, PruneConfig(what="positions", amount=0.25, by=by), [batch], teacher=tiny(kind, seed=3)
    )
    assert [stack.length for stack in layershare.find_stacks(pruned)] == [3] * (1 + (kind == "t5"))
    assert all(before - after == 1 for _, before, after in account(model, pruned).positions)
    assert flops(pruned, batch) < flops(model, batch)
    assert torch.equal(output(reloaded(pruned, tmp_path), batch), output(pruned, batch))


@pytest.mark.parametrize("name", ["tied", "mixed", "basis-output", "pivoted"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_positions_of_a_shared_model_are_dropped(kind, name, tiny, batch_for, tmp_path):
    model, batch = tiny(kind), batch_for(kind)
    student = layershare.share(model, plans(model)[name])
    stack = layershare.find_stacks(student)[0].name
    config = PruneConfig(what="positions", amount=1, by="influence", stacks=(stack,), protect=(0, 2, 3))
    pruned = prune(student, config, [batch])
    layershare.verify(pruned)
    assert layershare.plan_of(pruned).stacks[0].drop == (1,)
    skipped = copy.deepcopy(student)
    add_gate(skipped.get_submodule(f"{stack}.1"), 0.0)
    torch.testing.assert_close(output(skipped, batch), output(pruned, batch), rtol=1e-4, atol=1e-6)
    assert torch.equal(output(reloaded(pruned, tmp_path), batch), output(pruned, batch))
    twice = prune(pruned, PruneConfig(what="positions", amount=1, stacks=(stack,), protect=(0, 1)))
    assert layershare.plan_of(twice) is None or layershare.plan_of(twice).stacks[0].drop == (1, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"what": "neurons", "amount": 32}, "all 32"),
        ({"what": "neurons", "amount": 0.01}, "cuts none"),
        ({"what": "heads", "amount": 2}, "all 2"),
        ({"what": "positions", "amount": 4}, "At most 3"),
        ({"what": "positions", "amount": 1, "protect": (9,)}, "position 9"),
        ({"what": "positions", "amount": 0.1}, "drops none"),
        ({"what": "neurons", "amount": 0.5, "stacks": ("encoder.layers",)}, "encoder.layer"),
    ],
)
def test_cutting_all_or_nothing_is_refused(values, words, tiny):
    with pytest.raises(LayershareError, match=words):
        prune(tiny("bert"), PruneConfig(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"what": "neurons"},
        {"what": "neurons", "amount": 1.0},
        {"what": "neurons", "amount": 0},
        {"what": "neurons", "amount": -0.5},
        {"what": "heads", "amount": 0.5, "by": "influence"},
        {"what": "heads", "pattern": "2:4"},
        {"what": "weights", "pattern": "4:4"},
        {"what": "weights", "pattern": "a:b"},
        {"what": "weights", "amount": 3, "scope": "layer"},
        {"what": "weights", "amount": 0.5, "threshold": 1.0},
        {"what": "weights", "threshold": -1.0},
        {"what": "weights", "threshold": 2.0, "relative": True},
        {"what": "weights", "amount": 0.5, "keep_shape": True},
        {"what": "neurons", "amount": 0.5, "scoop": "row"},
        {"what": "neurons", "amount": True},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values):
    with pytest.raises(OptionError):
        PruneConfig.parse(values)


def test_an_importance_without_its_data_is_refused(tiny, batch_for):
    with pytest.raises(DataError, match="batches"):
        prune(tiny("bert"), PruneConfig(what="neurons", amount=0.5, by="taylor"))
    with pytest.raises(OptionError, match="teacher"):
        prune(tiny("bert"), PruneConfig(what="neurons", amount=0.5, by="taylor"), [batch_for("bert")])


def test_one_stack_of_two_with_a_common_field_is_refused(tiny):
    with pytest.raises(ModelError, match="prune them together"):
        prune(tiny("t5"), PruneConfig(what="neurons", amount=0.5, stacks=("encoder.block",)))


def test_neurons_stay_a_multiple(tiny):
    assert PruneConfig(what="neurons", amount=0.3, multiple=8).removed_of(32) == 8
    pruned = prune(tiny("bert"), PruneConfig(what="neurons", amount=0.3, multiple=8))
    assert pruned.config.intermediate_size == 24


def test_a_cut_that_the_architecture_does_not_bear_is_refused(tiny, batch_for, monkeypatch):
    """The proof notices a wrong cut."""
    model, batch = tiny("llama"), batch_for("llama")
    monkeypatch.setattr("layershare.prune.blocks.Block.columns", lambda _, units: units.flip(0))
    with pytest.raises(ModelError, match="silent"):
        prune(model, PruneConfig(what="neurons", amount=0.5), [batch])
    monkeypatch.undo()
    choice = the_choice(model, "neurons", batch)
    assert cut(model, choice).config.intermediate_size == 16


def test_the_verb_from_folder_to_folder(bert_folder, pairs_file, tmp_path, capsys):
    from layershare.cli import main

    words = [str(bert_folder), "--what", "neurons", "--amount", "8", "--by", "activation", "--json"]
    data = ["--task", "sentence-embedding", "--data", str(pairs_file)]
    assert main(["prune", *words, *data, "-o", str(tmp_path / "out")]) == 0
    assert '"intermediate_size"' in capsys.readouterr().out
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").config.intermediate_size == 24
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").cls_token == "[CLS]"
    assert main(["prune", *words, "-o", str(tmp_path / "none")]) == 2
    assert "--data" in capsys.readouterr().err
    assert (
        main(["prune", str(bert_folder), "--what", "heads", "--amount", "1", "-o", str(tmp_path / "none")])
        == 2
    )
    assert "keep_shape" in capsys.readouterr().err
    assert (
        main(["prune", str(bert_folder), "--what", "head", "--amount", "1", "-o", str(tmp_path / "none")])
        == 2
    )
    assert not (tmp_path / "none").exists()


def test_taylor_from_the_labels_of_a_task(tiny, tokenizer, tmp_path):
    folder, file = tmp_path / "model", tmp_path / "rows.csv"
    config = tiny("bert").config
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        "text,label",
        *(f"the cat {word},{i % 2}" for i, word in enumerate(["sits", "runs", "plays", "sings"] * 3)),
    ]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    asked = PruneConfig(what="neurons", amount=0.5, by="taylor")
    found = prune_folder(folder, asked, tmp_path / "out", task="text-classification", data=[file])
    assert found.sizes["intermediate_size"] == (32, 16)
