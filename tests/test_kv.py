"""Keys and values of one position for a group: the same with and without cache, against a model that copies them."""

import copy
import pickle

import pytest
import torch
import transformers

from laws import loss, output, same
from layershare import find_stacks, make_plan, predict, share, unshare, verify
from layershare.errors import ModelError, PlanError, TieError
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing import count
from layershare.sharing.kv import ReadingLayer

CHOICES = {
    "whole layers": dict(parts=("attention", "ffn")),
    "keys and values alone": dict(parts=("*k_proj*", "*v_proj*")),
    "with corrections": dict(parts=("attention",), rank=2, merge="mean"),
}


def plan(model, *groups, **values):
    (stack,) = find_stacks(model)
    made = tuple(Group(positions=one, kv=True, **values) for one in groups or [(0, 1), (2, 3)])
    return SharingPlan(stacks=(StackPlan(name=stack.name, length=stack.length, groups=made),))


@pytest.fixture
def decoder(tiny):
    """``decoder("gemma3")``: a tiny decoder of four layers with random norms and biases."""

    def make(kind, **sizes):
        if kind == "llama":
            model = tiny("llama", attention_bias=True, **sizes)
        else:
            torch.manual_seed(0)
            config = transformers.Gemma3TextConfig(
                vocab_size=26, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                head_dim=8, intermediate_size=32, sliding_window=4, pad_token_id=0, eos_token_id=3, bos_token_id=2,
                layer_types=["sliding_attention", "full_attention"] * 2,
            )  # fmt: skip
            model = transformers.Gemma3ForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(parameter, 0.5, 0.3)
        return model

    return make


def reference(model, groups):
    """A copy in which the maps of each group's later positions give what the first one's gave."""
    model, kept = copy.deepcopy(model), {}
    for owner, *others in groups:
        for leaf in ("k_proj", "v_proj"):
            first = getattr(model.model.layers[owner].self_attn, leaf)
            first.register_forward_hook(lambda _m, _a, out, key=(owner, leaf): kept.update({key: out}))
            for other in others:
                module = getattr(model.model.layers[other].self_attn, leaf)
                module.register_forward_hook(lambda _m, _a, _o, key=(owner, leaf): kept[key])
        for other in others:  # the norm of the keys goes with them
            if (norm := getattr(model.model.layers[other].self_attn, "k_norm", None)) is not None:
                norm.load_state_dict(model.model.layers[owner].self_attn.k_norm.state_dict())
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_others_compute_with_the_first_ones_keys_and_values(kind, decoder, batch_for):
    model = decoder(kind)
    student = share(model, plan(model, **CHOICES["keys and values alone"]))
    wanted = output(reference(model, [(0, 1), (2, 3)]), batch_for("llama"))
    assert torch.equal(output(student, batch_for("llama")), wanted)
    assert not torch.allclose(output(model, batch_for("llama")), wanted, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_that_without(kind, choice, beams, decoder, batch_for):
    model = decoder(kind)
    student = share(model, plan(model, **CHOICES[choice]))
    ids = batch_for("llama")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings = dict(
        attention_mask=mask,
        max_new_tokens=8,
        num_beams=beams,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    cached = student.generate(ids, **settings, use_cache=True)
    assert torch.equal(cached, student.generate(ids, **settings, use_cache=False))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_cached_pass_has_the_logits_of_the_training_pass(kind, decoder, batch_for):
    model = decoder(kind)
    student = share(model, plan(model)).train()
    ids = batch_for("llama")["input_ids"]
    whole = student(input_ids=ids, use_cache=False).logits
    cache, steps = None, []
    for i in range(ids.shape[1]):
        out = student(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache, steps = out.past_key_values, [*steps, out.logits]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


@torch.no_grad()
def test_a_cache_keeps_shared_keys_once_and_a_copy_of_it_stands_alone(decoder, batch_for):
    model = decoder("llama")
    student = share(model, plan(model, (0, 1, 2)))
    ids = batch_for("llama")["input_ids"]
    cache = student(input_ids=ids, use_cache=True).past_key_values
    assert [type(layer) is ReadingLayer for layer in cache.layers] == [False, True, True, False]
    assert [layer.keys is None for layer in cache.layers] == [False, True, True, False]
    other = copy.deepcopy(cache)
    step = ids[:, :1]
    wanted = student(input_ids=step, past_key_values=cache).logits
    assert other.get_seq_length(2) == ids.shape[1]
    assert torch.equal(student(input_ids=step, past_key_values=other).logits, wanted)
    assert cache.get_seq_length(2) == ids.shape[1] + 1


def test_layers_of_two_windows_keep_caches_of_their_own(decoder, batch_for):
    """Sliding windows keep copies; nor does a layer read from one that rotates its keys otherwise."""
    model = decoder("gemma3")
    for groups, wanted in (([(0, 2), (1, 3)], [False, False, False, True]), ([(1, 2)], [False] * 4)):
        student = share(model, plan(model, *groups))
        cache = student(**batch_for("llama"), use_cache=True).past_key_values
        assert [type(layer) is ReadingLayer for layer in cache.layers] == wanted


@torch.no_grad()
def test_a_position_without_rotation_keeps_a_cache_of_its_own(batch_for):
    torch.manual_seed(0)
    config = transformers.SmolLM3Config(
        vocab_size=26, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, no_rope_layers=[1, 0, 1, 1], pad_token_id=0,
    )  # fmt: skip
    model = transformers.SmolLM3ForCausalLM(config).eval()
    student = share(model, plan(model, (0, 1, 2)))
    ids = batch_for("llama")["input_ids"]
    cache = student(input_ids=ids[:, :-1], use_cache=True).past_key_values
    assert [type(layer) is ReadingLayer for layer in cache.layers] == [False, False, True, False]
    last = student(input_ids=ids[:, -1:], past_key_values=cache).logits
    assert torch.allclose(last[:, 0], student(input_ids=ids, use_cache=False).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_stored_is_predicted_and_saved_and_verified(choice, decoder, batch_for, tmp_path):
    model = decoder("gemma3")
    wanted = plan(model, **CHOICES[choice])
    student = share(model, wanted)
    assert count(student).layer_unique == predict(find_stacks(model), wanted).layer_unique
    assert verify(student).tied > 0
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for other in (again, copy.deepcopy(student), pickle.loads(pickle.dumps(student))):  # noqa: S301
        verify(other)
        assert same(other, student)
        assert torch.equal(output(other, batch_for("llama")), output(student, batch_for("llama")))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_copies(checkpointing, decoder, batch_for):
    model = decoder("llama")
    student = share(model, plan(model, **CHOICES["keys and values alone"])).train()
    copied = reference(model, [(0, 1), (2, 3)]).train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    for one in (student, copied):
        loss(one, batch_for("llama")).backward()
    found, wanted = (dict(one.named_parameters()) for one in (student, copied))
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.2.self_attn.v_proj.bias",
                 "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"):  # fmt: skip
        assert torch.allclose(found[name].grad, wanted[name].grad, rtol=1e-4, atol=1e-6), name
    copy.deepcopy(student)


def test_checkpointing_that_would_lose_gradients_is_refused(decoder, batch_for):
    model = decoder("llama")
    student = share(model, plan(model)).train()
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.enable_input_require_grads()
    with pytest.raises(ModelError, match="use_reentrant=False"):
        loss(student, batch_for("llama")).backward()


def test_the_maps_of_the_others_compute_nothing(decoder, batch_for):
    from torch.utils.flop_counter import FlopCounterMode

    model = decoder("llama")
    student = share(model, plan(model, (0, 1, 2, 3)))
    flops = []
    for one in (model, student):
        with FlopCounterMode(display=False) as counter:
            output(one, batch_for("llama"))
        flops.append(counter.get_total_flops())
    maps = 2 * 16 * 8  # keys and values, one head of 8
    assert flops[0] - flops[1] == 3 * 2 * maps * 12  # three positions, 12 tokens


def test_what_cannot_be_is_refused_by_name(decoder, tiny):
    for kind, why in (("gpt2", "no maps to keys and to values"), ("t5", "more than one attention")):
        model = tiny(kind)
        stack = find_stacks(model)[-1]
        groups = (Group(positions=(0, 1), kv=True),)
        with pytest.raises(PlanError, match=why):
            share(model, SharingPlan(stacks=(StackPlan(name=stack.name, length=4, groups=groups),)))
    with pytest.raises(PlanError, match="kv = true is for"):
        SharingPlan.from_dict({"stacks": [{"name": "x", "length": 4, "groups": [
            {"positions": [0, 1], "kv": True, "method": "basis", "rank": 2}]}]})  # fmt: skip
    student = share(model := decoder("llama"), plan(model))
    with pytest.raises(ModelError, match="no ordinary model"):
        unshare(student)
    del student.model.layers[1].self_attn.v_proj._forward_hooks[-3]
    with pytest.raises(TieError, match=r"layers\.1\.self_attn\.v_proj"):
        verify(student)


def test_a_plan_says_whose_keys_and_values(decoder):
    model = decoder("llama")
    made = plan(model)
    assert "keys and values of 2" in str(made)
    assert SharingPlan.from_toml(made.to_toml()) == made
    assert make_plan(model, "adjacent", unique=2, kv=True) == made


def test_from_folder_to_folder_and_as_a_stream(decoder, tmp_path):
    from layershare.cli import main

    decoder("gemma3").save_pretrained(tmp_path / "in")
    common = ["share", str(tmp_path / "in"), "--preset", "adjacent", "--unique", "2", "--kv"]
    assert main([*common, "-o", str(tmp_path / "whole")]) == 0
    assert main([*common, "-o", str(tmp_path / "streamed"), "--stream"]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "streamed")]
    assert files[0] == files[1]
    assert main(["verify", str(tmp_path / "streamed")]) == 0
    assert main(["export", str(tmp_path / "whole"), "--format", "dense", "-o", str(tmp_path / "dense")]) == 2
    prune = ["prune", str(tmp_path / "whole"), "--amount", "0.5", "-o", str(tmp_path / "cut"), "--what"]
    assert main([*prune, "heads"]) == 2
    assert not (tmp_path / "cut").exists()
    assert main([*prune, "neurons"]) == 0


def test_the_export_computes_and_caches_them_once(decoder, tmp_path):
    pytest.importorskip("onnxscript")
    from layershare.export import export
    from layershare.onnx import load

    model = decoder("llama", num_key_value_heads=2)
    share(model, plan(model)).save_pretrained(tmp_path / "in")
    made = export(tmp_path / "in", tmp_path / "out", "onnx")
    inputs = [one.name for one in load(tmp_path / "out").sessions["model"].get_inputs()]
    assert [name for name in inputs if name.endswith("key")] == [f"past_key_values.{i}.key" for i in (0, 2)]
    assert made.products == 4 * 7 - 2 * 2 + 1  # the others' maps to keys and values are gone
    assert made.difference < 1e-4 * made.scale
