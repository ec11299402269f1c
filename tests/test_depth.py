"""Dropping layers gives an ordinary, shorter model of the same class."""

import pytest
import torch
from transformers import AutoConfig, BertModel, LlamaForCausalLM

import layershare
from laws import output, same
from layershare.errors import ModelError, PlanError
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing.depth import drop_layers


def cut(model, *positions, stack=0):
    return drop_layers(model, layershare.find_stacks(model)[stack], positions)


def test_a_shorter_model_of_the_same_class(tiny, batch_for, kind):
    model = tiny(kind)
    short = cut(model, 1, 3)
    assert type(short) is type(model)
    names = [stack.name for stack in layershare.find_stacks(model)]
    assert [len(short.get_submodule(name)) for name in names] == [2, 4][: len(names)]
    assert {len(model.get_submodule(name)) for name in names} == {4}
    assert layershare.plan_of(short) is None
    name = names[0]
    for new, old in enumerate((0, 2)):
        assert same(short.get_submodule(f"{name}.{new}"), model.get_submodule(f"{name}.{old}"))
    output(short, batch_for(kind))


def test_it_loads_as_any_model(tiny, batch_for, tmp_path, kind):
    short = cut(tiny(kind), 2)
    short.save_pretrained(tmp_path)
    again, info = type(short).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(output(again, batch_for(kind)), output(short, batch_for(kind)))
    assert AutoConfig.from_pretrained(tmp_path).get_text_config().num_hidden_layers == 3


def test_layers_are_numbered_anew(tiny):
    short = cut(tiny("llama"), 1, 2)
    assert [layer.self_attn.layer_idx for layer in short.model.layers] == [0, 1]
    ids = torch.tensor([[5, 6, 7]])
    cached, plain = (
        short.generate(ids, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, use_cache=c) for c in (1, 0)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(("stack", "lengths"), [(0, [1, 4]), (1, [4, 1])])
def test_each_stack_of_t5_alone(tiny, batch_for, stack, lengths):
    model = tiny("t5")
    names = [one.name for one in layershare.find_stacks(model)]
    short = cut(model, 1, 2, 3, stack=stack)
    assert [len(short.get_submodule(name)) for name in names] == lengths
    output(short, batch_for("t5"))


def test_both_stacks_of_t5_to_one_layer(tiny, batch_for):
    model = tiny("t5")
    plan = layershare.make_plan(model, "drop", unique=1)
    short = layershare.share(model, plan)
    assert (len(short.encoder.block), len(short.decoder.block)) == (1, 1)
    output(short, batch_for("t5"))


def test_lists_of_one_entry_a_layer_are_cut_too(tiny):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=20
    )
    config = Qwen2Config(
        num_hidden_layers=4, layer_types=kinds, sliding_window=4, use_sliding_window=True, **sizes
    )
    short = cut(Qwen2ForCausalLM(config), 1, 2)
    assert short.config.layer_types == ["full_attention", "sliding_attention"]


def test_precision_and_buffers_stay_as_they_are(tiny, tmp_path, batch_for):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.model.norm.float()
    short = cut(model, 1, 2)
    kept = {name: value.dtype for name, value in short.state_dict().items()}
    assert kept == {name: value.dtype for name, value in model.state_dict().items() if name in kept}
    buffers = dict(short.named_buffers())
    assert buffers["model.rotary_emb.inv_freq"].dtype == torch.float32
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())


def test_the_original_is_untouched_and_nothing_is_shared_with_it(tiny):
    model = tiny("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    short = cut(model, 0)
    with torch.no_grad():
        for tensor in (*short.parameters(), *short.buffers()):
            tensor.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_was_tied_or_frozen_or_training_still_is(tiny):
    model = tiny("gpt2").train()
    model.transformer.h[3].requires_grad_(False)
    model.generation_config.max_new_tokens = 7
    short = cut(model, 1)
    assert short.lm_head.weight is short.transformer.wte.weight
    assert [layer.ln_1.weight.requires_grad for layer in short.transformer.h] == [True, True, False]
    assert short.training
    assert short.generation_config.max_new_tokens == 7


def test_the_first_layer_of_t5_brings_what_the_others_need(tiny):
    with pytest.raises(PlanError, match=r"positions \[0\] of 'encoder.block'.*Keep the first position"):
        cut(tiny("t5"), 0)


def test_a_length_without_a_config_field_is_told():
    class Fixed(BertModel):
        def __init__(self, config):
            super().__init__(config)
            while len(self.encoder.layer) < 4:
                self.encoder.layer.append(type(self.encoder.layer[0])(config))

    from transformers import BertConfig

    from conftest import KINDS

    with pytest.raises(ModelError, match=r"BertConfig sets the length of 'encoder.layer'.*Gate them"):
        cut(Fixed(BertConfig(**KINDS["bert"][2])), 1)


def test_shared_groups_count_positions_of_the_original(tiny, batch_for):
    model = tiny("bert")
    plan = SharingPlan(
        stacks=(
            StackPlan(
                name="encoder.layer", length=4, drop=(0,), groups=(Group(positions=(2, 3), merge="last"),)
            ),
        )
    )
    shared = layershare.share(model, plan)
    first, second, third = (layer.attention.self.query.weight for layer in shared.encoder.layer)
    assert torch.equal(first, model.encoder.layer[1].attention.self.query.weight)
    assert second is third
    assert torch.equal(second, model.encoder.layer[3].attention.self.query.weight)
