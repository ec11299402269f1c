"""Stacks are found by structure: names, shapes and parts, with no weights and no model names."""

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel

import layershare
from layershare import find_stacks
from layershare.errors import ModelError
from layershare.stacks import same_stack

FOUND = {
    "bert": {"encoder.layer": "BertLayer"},
    "gpt2": {"transformer.h": "GPT2Block"},
    "llama": {"model.layers": "LlamaDecoderLayer"},
    "t5": {"encoder.block": "T5Block", "decoder.block": "T5Block"},
    "vit": {"layers": "ViTLayer"},
}
# Matrices of one layer, from the configs: hidden 16, feed-forward 32 (GPT-2: 64), one key-value head of 8 in Llama.
MATRICES = {
    "bert": (4 * 16 * 16, 2 * 16 * 32),
    "gpt2": (4 * 16 * 16, 2 * 16 * 64),
    "llama": (2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 32),
    "vit": (4 * 16 * 16, 2 * 16 * 32),
}


def test_stacks_of_each_architecture(tiny, kind):
    stacks = find_stacks(tiny(kind))
    assert {stack.name: stack.layer_class for stack in stacks} == FOUND[kind]
    assert all(stack.length == 4 and not stack.tied for stack in stacks)


@pytest.mark.parametrize("kind", MATRICES)
def test_parts(tiny, kind):
    model = tiny(kind)
    (stack,) = find_stacks(model)
    attention, ffn = MATRICES[kind]
    every = sum(p.numel() for p in model.get_submodule(stack.name).parameters())
    norm = every - 4 * (attention + ffn)
    assert stack.parameters == {"attention": 4 * attention, "ffn": 4 * ffn, "norm": norm, "other": 0}
    assert stack.size == every
    assert all(len(w.shape) == 1 for layer in stack.layers for w in layer if w.part == "norm")


def test_parts_of_t5(tiny):
    encoder, decoder = find_stacks(tiny("t5"))
    assert (
        encoder.parameters["attention"] == 4 * 4 * 16 * 16 + 32 * 2
    )  # the first layer brings the relative positions
    assert decoder.parameters["attention"] == 4 * 8 * 16 * 16 + 32 * 2
    assert [len(layer) for layer in encoder.layers] == [9, 8, 8, 8]


def test_kinds_of_modules(tiny):
    kinds = {w.name: w.kind for w in find_stacks(tiny("gpt2"))[0].layers[0]}
    assert (kinds["attn.c_attn.weight"], kinds["attn.c_attn.bias"], kinds["ln_1.weight"]) == (
        "conv1d",
        "other",
        "other",
    )
    assert {w.kind for w in find_stacks(tiny("bert"))[0].layers[0] if w.part == "ffn"} == {"linear"}


def test_no_weights_are_needed(tiny, kind):
    model = tiny(kind)
    with torch.device("meta"):
        sketch = type(model)(model.config)
    assert find_stacks(sketch) == find_stacks(model)


def test_a_shared_model_has_the_same_stacks(tiny, kind):
    model = tiny(kind)
    shared = layershare.share(model, layershare.make_plan(model, "basis", rank=3))
    before, after = find_stacks(model), find_stacks(shared)
    assert [stack.layers for stack in after] == [stack.layers for stack in before]
    assert all(stack.tied for stack in after)
    assert "already shared" in str(after[0])


def test_a_layer_inside_a_layer_is_no_stack():
    block = lambda: nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)])  # noqa: E731
    (stack,) = find_stacks(nn.ModuleDict({"outer": nn.ModuleList([block(), block()])}))
    assert stack.name == "outer"


def test_layers_of_different_shapes_are_one_stack_if_two_agree():
    layer = lambda size: nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))  # noqa: E731
    (stack,) = find_stacks(nn.ModuleDict({"blocks": nn.ModuleList([layer(2), layer(4), layer(2)])}))
    assert (stack.length, stack.size) == (3, 2 * 12 + 40)
    with pytest.raises(ModelError, match="ModuleDict has no repeated layers"):
        find_stacks(nn.ModuleDict({"blocks": nn.ModuleList([layer(2), layer(3)])}))


@pytest.mark.parametrize(
    "children",
    [
        [nn.Linear(4, 4), nn.Linear(4, 4)],  # no layers: single maps
        [nn.LayerNorm(4), nn.LayerNorm(4)],
        [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))] * 1,
    ],
)
def test_what_is_no_stack(children):
    with pytest.raises(ModelError, match="no repeated layers"):
        find_stacks(nn.ModuleDict({"blocks": nn.ModuleList(children)}))


def test_layers_of_equal_shapes_and_different_classes_are_not_alike():
    class Other(nn.Sequential):
        pass

    layers = [kind(nn.Linear(2, 2), nn.Linear(2, 2)) for kind in (nn.Sequential, Other)]
    with pytest.raises(ModelError, match="no repeated layers"):
        find_stacks(nn.ModuleDict({"blocks": nn.ModuleList(layers)}))


def test_albert_is_told_to_be_shared_already():
    sizes = dict(hidden_size=8, embedding_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=9)
    model = AlbertModel(AlbertConfig(num_hidden_layers=3, **sizes))
    with pytest.raises(ModelError, match=r"already shared, encoder.albert_layer_groups.*applies it 3 times"):
        find_stacks(model)


def test_what_is_left_of_a_known_stack_counts(tiny):
    model = tiny("bert", num_hidden_layers=1)
    (stack,) = find_stacks(model, ["bert.encoder.layer"])
    assert (stack.name, stack.length) == ("encoder.layer", 1)


def test_names_differ_by_a_prefix_only():
    assert same_stack("encoder.layer", "bert.encoder.layer")
    assert same_stack("bert.encoder.layer", "encoder.layer")
    assert not same_stack("encoder.layer", "coder.layer")
    assert not same_stack("encoder.block", "decoder.block")
