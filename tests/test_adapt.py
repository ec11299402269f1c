"""Adapters: they start as nothing, train alone, leave the base as it is, and come back from disk as they were."""

import copy
import json

import pytest
import torch
import transformers

import layershare
from layershare.errors import LayershareError, ModelError, OptionError, TieError
from layershare.linear import FactoredLinear

peft = pytest.importorskip("peft")

from layershare.adapt import AdaptConfig, adapt, load, merge  # noqa: E402
from layershare.adapt.base import RECORD, bare  # noqa: E402
from layershare.adapt.places import ends, places  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")

IDENTITIES = ("houlsby", "pfeiffer", "lora", "ia3")
EVERY = (*IDENTITIES, "prefix")
D, FFN, LAYERS = 16, 32, 4  # the sizes of the tiny models


def shared(model, kind="tie"):
    """Two weight sets for four positions: tied, tied with a private correction, or on a common basis."""
    options = {"tie": {}, "corrected": {"rank": 2}, "basis": {"budget": 0.6}}[kind]
    if kind == "basis":
        return layershare.share(model, layershare.make_plan(model, "basis", **options))
    return layershare.share(model, layershare.make_plan(model, "adjacent", unique=2, **options))


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def size(model):
    return sum(p.numel() for p in trainable(model).values())


def stir(model, by=0.05):
    """Move all trainable values, as training would."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(by * torch.randn(p.shape, generator=draw))
    return model


# ---- at the start


@pytest.mark.parametrize("method", IDENTITIES)
@pytest.mark.parametrize("form", ["plain", "tie", "basis"])
def test_a_new_adapter_changes_nothing_exactly(tiny, batch_for, kind, method, form):
    model = tiny(kind) if form == "plain" else shared(tiny(kind), form)
    batch = batch_for(kind)
    before = outputs(model, batch)
    adapted = adapt(model, AdaptConfig(method=method))
    assert torch.equal(outputs(adapted, batch), before)
    assert not torch.equal(outputs(stir(adapted), batch), before)
    assert torch.equal(outputs(model, batch), before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_prefix_works_where_there_is_a_cache(tiny, batch_for, name):
    model, batch = shared(tiny(name)), batch_for(name)
    before = outputs(model, batch)
    adapted = adapt(model, AdaptConfig(method="prefix", tokens=3))
    after = outputs(adapted, batch)
    assert after.shape == before.shape
    assert not torch.allclose(after, before)
    assert all("prompt_encoder" in name for name in trainable(adapted))


def test_the_first_values_follow_the_seed_alone(tiny):
    values = []
    for noise, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(noise)
        adapted = adapt(tiny("bert"), AdaptConfig(method="lora", seed=seed))
        values.append(torch.cat([p.flatten() for p in trainable(adapted).values()]))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_generation_with_a_cache_equals_generation_without(tiny):
    ids = torch.tensor([[5, 6, 7, 8]])
    for method in ("houlsby", "lora", "ia3"):
        adapted = stir(adapt(shared(tiny("llama")), AdaptConfig(method=method)), 0.5)
        settings = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert torch.equal(
            adapted.generate(**settings, use_cache=True), adapted.generate(**settings, use_cache=False)
        )


# ---- where they stand


ENDS = {
    "bert": ({"attention.output.dense"}, {"output.dense"}),
    "gpt2": ({"attn.c_proj"}, {"mlp.c_proj"}),
    "llama": ({"self_attn.o_proj"}, {"mlp.down_proj"}),
    "t5": (
        {"layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"},
        {"layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"},
    ),
    "vit": ({"attention.o_proj"}, {"mlp.fc2"}),
}


def test_the_maps_that_end_attention_and_ffn_are_found(tiny, kind):
    model = tiny(kind)
    for part, wanted in zip(("attention", "ffn"), ENDS[kind], strict=True):
        found = {place.module for place in ends(model, [part])}
        assert {name for name in found if not any(name.endswith(f".{end}") for end in wanted)} == set()
        assert all(any(name.endswith(f".{end}") for name in found) for end in wanted)
    stacks = layershare.find_stacks(model)
    cross = LAYERS if kind == "t5" else 0
    assert len(ends(model, ["attention"])) == sum(stack.length for stack in stacks) + cross
    assert len(ends(model, ["ffn"])) == sum(stack.length for stack in stacks)


def test_sharing_does_not_move_them(tiny, kind):
    assert places(shared(tiny(kind), "corrected")) == places(tiny(kind))


def test_a_mixture_of_experts_has_no_end_of_its_ffn():
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.MixtralConfig(
        vocab_size=27, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, **sizes
    )
    model = transformers.MixtralModel(config)
    with pytest.raises(ModelError, match="mixture of experts"):
        adapt(model, AdaptConfig(method="pfeiffer"))
    assert trainable(adapt(model, AdaptConfig(method="lora", parts=("attention",))))


# ---- how many parameters


def counts(kind, config):
    """Trainable parameters at one position, by hand. T5 has two kinds of layers, see the test."""
    s, r = config.size, config.rank
    bottleneck = 2 * D * s + D + s
    key_values = D // 2 if kind == "llama" else D
    match config.method:
        case "houlsby":
            return 2 * bottleneck
        case "pfeiffer":
            return bottleneck
        case "prefix":
            return 2 * config.tokens * key_values
        case "ia3":
            return D + 2 * key_values + FFN * (2 if kind == "gpt2" else 1)  # GPT-2 has 4 d
        case "lora":
            fused, inner = kind == "gpt2", 4 * D if kind == "gpt2" else FFN
            attention = (D + 3 * D) + 2 * D if fused else 2 * (2 * D) + 2 * (D + key_values)
            gates = 2 if kind == "llama" else 1
            return r * (attention + (gates + 1) * (D + inner))


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_the_number_of_parameters_is_the_formula(tiny, name, method):
    if (name, method) == ("vit", "prefix"):
        pytest.skip("no cache")
    settings = {"size": 5} if method in ("houlsby", "pfeiffer") else {}
    settings |= {"rank": 3} if method == "lora" else {"tokens": 7} if method == "prefix" else {}
    config = AdaptConfig(method=method, **settings)
    one = counts(name, config)
    assert size(adapt(tiny(name), config)) == LAYERS * one
    student = shared(tiny(name))
    assert size(adapt(student, config)) == LAYERS * one
    if method != "prefix":
        per_group = config.model_copy(update={"share": "group"})
        assert size(adapt(student, per_group)) == 2 * one


def test_t5_has_an_adapter_behind_each_attention(tiny):
    adapted = adapt(tiny("t5"), AdaptConfig(method="houlsby", size=5))
    assert size(adapted) == (LAYERS * 2 + LAYERS * 3) * (2 * D * 5 + D + 5)


def test_a_plan_says_the_groups_for_a_model_that_is_not_shared(tiny):
    model = tiny("bert")
    plan = layershare.make_plan(model, "adjacent", unique=1)
    adapted = adapt(model, AdaptConfig(method="pfeiffer", size=5, share="group"), plan=plan)
    assert size(adapted) == 2 * D * 5 + D + 5


@pytest.mark.parametrize("method", IDENTITIES)
def test_a_module_of_a_group_gets_the_sum_of_the_gradients_of_its_positions(tiny, batch_for, method):
    student, batch = shared(tiny("bert")), batch_for("bert")
    apart = stir(adapt(student, AdaptConfig(method=method)), 0)
    together = adapt(student, AdaptConfig(method=method, share="group"))
    with torch.no_grad():  # equal values everywhere, and none of them zero
        for model in (apart, together):
            for p in trainable(model).values():
                p.copy_(torch.linspace(0.1, 0.2, p.numel()).view_as(p))
    for model in (apart, together):
        model(**batch)[0].square().sum().backward()
    parts = sum(p.grad.double().sum() for p in trainable(apart).values())
    whole = sum(p.grad.double().sum() for p in trainable(together).values())
    assert whole == pytest.approx(float(parts), rel=1e-4)


# ---- what trains


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("form", ["plain", "tie", "basis"])
def test_training_moves_the_adapters_and_not_one_bit_of_the_base(tiny, batch_for, method, form):
    model = tiny("llama") if form == "plain" else shared(tiny("llama"), form)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = adapt(model, AdaptConfig(method=method)).train()
    moving = trainable(adapted)
    start = {name: p.detach().clone() for name, p in moving.items()}
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(**batch_for("llama")).logits.square().mean().backward()
        optimizer.step()
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)
    assert any(not torch.equal(p, start[name]) for name, p in moving.items())
    after = bare(adapted).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if form != "plain":
        assert layershare.verify(adapted) == layershare.verify(model)


def test_the_model_that_was_given_stays_as_it_was(tiny):
    model = tiny("bert")
    modules = dict(model.named_modules())
    adapted = adapt(model, AdaptConfig(method="lora"))
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")
    first = next(bare(adapted).parameters())
    assert first.data_ptr() == next(model.parameters()).data_ptr()  # no second copy in memory


def test_a_task_head_trains_and_a_language_model_head_does_not(tiny, tmp_path, batch_for):
    config = tiny("bert").config
    config.num_labels = 3
    model = transformers.BertForSequenceClassification(config).eval()
    adapted = stir(adapt(model, AdaptConfig(method="pfeiffer")), 0.5)
    heads = [name for name in trainable(adapted) if "classifier" in name]
    assert len(heads) == 2
    adapted.save_pretrained(tmp_path)
    batch = batch_for("bert")
    assert torch.equal(outputs(load(model, tmp_path), batch), outputs(adapted, batch))
    frozen = adapt(model, AdaptConfig(method="pfeiffer", train_head=False))
    assert not any("classifier" in name for name in trainable(frozen))
    assert not any("lm_head" in name for name in trainable(adapt(tiny("llama"), AdaptConfig(method="lora"))))


# ---- on disk


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("share", ["position", "group"])
def test_peft_itself_loads_what_was_saved(tiny, batch_for, tmp_path, method, share):
    if (method, share) == ("prefix", "group"):
        pytest.skip("a prefix has no groups")
    student, batch = shared(tiny("gpt2"), "corrected"), batch_for("gpt2")
    adapted = stir(adapt(student, AdaptConfig(method=method, share=share)))
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    wanted = outputs(adapted, batch)
    with_peft = peft.PeftModel.from_pretrained(copy.deepcopy(student), tmp_path).eval()
    assert torch.equal(outputs(with_peft, batch), wanted)
    ours = load(student, tmp_path)
    assert torch.equal(outputs(ours, batch), wanted)
    assert not trainable(ours)
    if method != "prefix":
        again = load(student, tmp_path, trainable=True)
        assert size(again) == size(adapted)  # also modules of groups are one again
        again.save_pretrained(tmp_path / "again")
        first, second = ((folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes()
        assert (tmp_path / RECORD).read_bytes() == (tmp_path / "again" / RECORD).read_bytes()


def test_a_bottleneck_of_a_group_is_stored_once(tiny, tmp_path):
    from safetensors.torch import load_file

    adapt(shared(tiny("bert")), AdaptConfig(method="pfeiffer", size=5, share="group")).save_pretrained(
        tmp_path
    )
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) == 2 * (2 * D * 5 + D + 5)


def test_a_saved_shared_base_takes_its_adapter_again(tiny, batch_for, tmp_path):
    student = shared(tiny("bert"))
    student.save_pretrained(tmp_path / "base")
    adapted = stir(adapt(student, AdaptConfig(method="houlsby", share="group")))
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, batch_for("bert")), outputs(adapted, batch_for("bert")))
    layershare.verify(loaded)


@pytest.mark.parametrize("method", ["houlsby", "lora", "prefix"])
def test_an_adapter_for_another_base_is_refused_by_peft_too(tiny, tmp_path, method):
    adapt(shared(tiny("llama")), AdaptConfig(method=method)).save_pretrained(tmp_path)
    others = {
        "shared model, this is an unshared": tiny("llama"),
        "another plan": layershare.share(
            tiny("llama"), layershare.make_plan(tiny("llama"), "cycle", unique=2)
        ),
        "weights": shared(tiny("llama", seed=1)),
        "shapes": shared(tiny("llama", vocab_size=30)),
        "belongs to a LlamaForCausalLM": tiny("gpt2"),
    }
    for reason, other in others.items():
        with pytest.raises(ModelError, match=reason):
            load(other, tmp_path)
        if "belongs" not in reason:  # PEFT does not even find the layers then, and says so
            with pytest.raises(ModelError, match=reason):
                peft.PeftModel.from_pretrained(other, tmp_path)


# ---- merging


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("form", ["plain", "tie", "corrected"])
def test_merging_into_an_unshared_copy_keeps_the_outputs(tiny, batch_for, kind, method, form):
    model = tiny(kind) if form == "plain" else shared(tiny(kind), form)
    model, batch = model.double(), batch_for(kind)
    batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    adapted = stir(adapt(model, AdaptConfig(method=method)).double())
    wanted = outputs(adapted, batch)
    merged = merge(adapted)
    assert torch.allclose(outputs(merged, batch), wanted, atol=1e-9, rtol=1e-9)
    assert torch.equal(outputs(adapted, batch), wanted)
    assert layershare.plan_of(merged) is None
    assert not any("lora" in name or "ia3" in name for name, _ in merged.named_parameters())
    assert not any(isinstance(module, FactoredLinear) for module in merged.modules())
    assert not trainable(merged).keys() ^ dict(merged.named_parameters()).keys()


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("form", ["tie", "corrected", "basis"])
@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_peft_cannot_merge_into_shared_weights(tiny, batch_for, method, form, call):
    student, batch = shared(tiny("bert"), form), batch_for("bert")
    adapted = stir(adapt(student, AdaptConfig(method=method)))
    wanted = outputs(adapted, batch)
    with pytest.raises(TieError, match=r"adapt\.merge"):
        getattr(adapted, call)()
    assert torch.equal(outputs(adapted, batch), wanted)


def test_the_guard_also_holds_for_adapters_made_by_peft_alone(tiny):
    made = peft.get_peft_model(shared(tiny("bert")), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(TieError, match="shares its weight"):
        made.merge_and_unload()
    mixed = peft.get_peft_model(shared(tiny("bert")), peft.LoraConfig(target_modules=["query"]), mixed=True)
    with pytest.raises(TieError, match="shares its weight"):
        mixed.merge_and_unload()
    one = peft.LoraConfig(target_modules=["query"], layers_to_transform=[0])
    with pytest.raises(TieError, match="shares its weight"):  # position 1 would change too
        peft.get_peft_model(shared(tiny("bert")), one).merge_and_unload()


def test_peft_merges_unshared_weights_as_ever_and_not_into_the_model_given(tiny, batch_for):
    model, batch = tiny("bert"), batch_for("bert")
    before = outputs(model, batch)
    adapted = stir(adapt(model, AdaptConfig(method="lora")))
    wanted = outputs(adapted, batch)
    assert torch.allclose(outputs(adapted.merge_and_unload(), batch), wanted, atol=1e-5)
    assert torch.equal(outputs(model, batch), before)


def test_what_cannot_be_merged_says_so(tiny):
    student = shared(tiny("gpt2"))
    for method in ("houlsby", "prefix"):
        with pytest.raises(OptionError, match="cannot be merged"):
            merge(adapt(student, AdaptConfig(method=method)))
    with pytest.raises(TieError, match="not linear"):
        adapt(tiny("gpt2"), AdaptConfig(method="houlsby")).merge_and_unload()


# ---- wrong input


def test_wrong_input_is_refused_in_clear_words(tiny, tmp_path):
    with pytest.raises(ModelError, match="no key-value cache"):
        adapt(tiny("vit"), AdaptConfig(method="prefix"))
    with pytest.raises(OptionError, match="no sharing plan"):
        adapt(tiny("bert"), AdaptConfig(method="lora", share="group"))
    with pytest.raises(ModelError, match="adapters already"):
        adapt(adapt(tiny("bert")), AdaptConfig())
    with pytest.raises(LayershareError, match=r"adapter_config\.json"):
        load(tiny("bert"), tmp_path)
    for values, words in (
        ({"method": "ia3", "rank": 4}, "rank"),
        ({"method": "prefix", "share": "group"}, "prefix"),
        ({"method": "lorra"}, "method"),
        ({"ranc": 4}, "Did you mean 'rank'"),
    ):
        with pytest.raises(OptionError, match=words):
            AdaptConfig.parse(values)
    config = AdaptConfig(method="houlsby", size=3)
    assert AdaptConfig.parse(config.model_dump(mode="json")) == config


def test_without_layershare_peft_says_what_is_missing(tiny, tmp_path):
    adapt(tiny("bert"), AdaptConfig(method="pfeiffer")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LAYERSHARE_BOTTLENECK"
