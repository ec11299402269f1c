"""What users do with a model after loading keeps the ties; what would untie it is found, named and mended."""

import copy
import multiprocessing
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import layershare
from laws import loss, output, plan_for, same
from layershare import find_stacks, plan_of, retie, share, unshare, verify
from layershare.errors import TieError
from layershare.linear import FactoredLinear
from layershare.sharing.wrapped import bare, submodule
from layershare.store.open import copy_preprocessing


def shared(model, name, batch):
    return share(model, plan_for(model, name), calibration=[batch])


@pytest.fixture
def student(tiny, batch_for):
    return shared(tiny("bert"), "adjacent", batch_for("bert"))


# --- keeps the ties


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_compiled_models_compute_the_same_in_one_graph(tiny, batch_for, kind):
    model, batch = shared(tiny(kind), "mixed", batch_for(kind)), batch_for(kind)
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="aot_eager", fullgraph=True
    )  # what comes before code is generated
    assert torch.equal(output(compiled, batch), output(model, batch))
    assert verify(compiled) == verify(model)
    loss(compiled, batch).backward()
    assert all(
        p.grad is not None for n, p in model.named_parameters() if n.startswith(find_stacks(model)[0].name)
    )


def test_half_and_bfloat16_by_their_short_names(student):
    for cast in (student.half, student.bfloat16, lambda: student.to(torch.bfloat16), student.float):
        assert verify(cast()).tied


@pytest.mark.parametrize("name", ["adjacent", "gated", "mixed"])
def test_gradient_checkpointing_as_the_trainer_turns_it_on(tiny, batch_for, name):
    model = shared(tiny("llama"), name, batch_for("llama")).train()
    loss(model, batch_for("llama")).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pytest.warns(FutureWarning):  # the name that most users know
        model.gradient_checkpointing_enable()
    loss(model, batch_for("llama")).backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)
    assert verify(model).tied


def elsewhere(model, batch, answers):
    """In another process."""
    answers.put((str(verify(model)), output(model, batch).tolist()))


def test_models_travel_to_other_processes(tiny, batch_for):
    model, batch = shared(tiny("bert"), "mixed", batch_for("bert")), batch_for("bert")
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=elsewhere, args=(model, batch, answers))
    process.start()
    account, values = answers.get(timeout=100)
    process.join()
    assert account == str(verify(model))
    assert torch.equal(torch.tensor(values), output(model, batch))


def test_a_sentence_transformer_opens_the_folder(bert_folder, batch_for, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    parts = [Transformer(str(bert_folder)), Pooling(16, pooling_mode="mean")]
    library.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "plain"))
    model = transformers.AutoModel.from_pretrained(tmp_path / "plain")
    small = shared(model, "mixed", batch_for("bert"))
    small.save_pretrained(tmp_path / "shared")
    copy_preprocessing(tmp_path / "plain", tmp_path / "shared")
    opened = library.SentenceTransformer(str(tmp_path / "shared"), device="cpu")
    assert verify(opened[0].model) == verify(small)
    texts = ["the cat sits", "a dog runs in the park"]
    inputs = opened.tokenize(texts)
    states = output(small, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    mask = inputs["attention_mask"].unsqueeze(-1)
    by_hand = (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(torch.tensor(opened.encode(texts)), by_hand, atol=1e-5, rtol=1e-5)
    opened.save(str(tmp_path / "again"))
    assert same(library.SentenceTransformer(str(tmp_path / "again"), device="cpu")[0].model, small)


# --- with adapters of PEFT on top


ALONE = """
import sys, layershare
from importlib.util import find_spec
assert find_spec("peft") and find_spec("transformers.modeling_utils")  # as libraries ask what is there
import transformers, peft
print([hasattr(one, "_by_layershare") for one in (peft.PeftModel.save_pretrained, peft.PeftModel.load_adapter)])
print("layershare" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING)
"""


def test_asking_for_a_library_does_not_disarm_us():
    pytest.importorskip("peft")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE], capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\n") == ["[True, True]", "True", ""]


@pytest.fixture(params=["adjacent", "relaxed", "basis", "mixed"])
def adapted(request, tiny, batch_for):
    peft = pytest.importorskip("peft")
    model = shared(tiny("bert"), request.param, batch_for("bert"))
    wanted = output(model, batch_for("bert"))
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "intermediate.dense"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return made, wanted


def test_one_verify_sees_through_adapters(adapted, batch_for):
    made, wanted = adapted
    account = verify(made)
    assert account == verify(bare(made))
    assert account.tied or account.factored
    off = made.unload()
    assert verify(off) == account
    assert torch.equal(output(off, batch_for("bert")), wanted)
    peft = pytest.importorskip("peft")
    other = peft.get_peft_model(off, peft.IA3Config(target_modules=["query"], feedforward_modules=[]))
    assert verify(other) == account
    off = other.unload()  # of this method, PEFT assigns the weights, also those that are computed
    assert verify(off) == account
    assert torch.equal(output(off, batch_for("bert")), wanted)


def test_adapters_are_per_position_come_back_and_are_merged_in_a_copy_only(adapted, batch_for, tmp_path):
    import peft

    made, wanted = adapted
    batch = batch_for("bert")
    outputs = output(made, batch)
    assert not torch.allclose(outputs, wanted, atol=1e-3)
    count = sum("query.lora_A" in name for name, _ in made.named_parameters())
    assert count == find_stacks(bare(made))[0].length
    made.save_pretrained(tmp_path / "adapter")
    base = made.get_base_model()
    with pytest.raises(TieError, match=r"adapt\.merge\(model\): it merges into an unshared copy"):
        made.merge_and_unload()
    dense = layershare.adapt.merge(made)
    torch.testing.assert_close(output(dense, batch), outputs, atol=1e-4, rtol=1e-4)
    assert torch.equal(output(made, batch), outputs)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(made).unload(), tmp_path / "adapter").eval()
    assert torch.equal(output(again, batch), outputs)
    assert base is made.get_base_model()


def test_ties_are_mended_below_adapters(adapted):
    made, _ = adapted
    account = verify(made)
    if not account.tied:
        pytest.skip("nothing is tied")
    inside = made.get_base_model()
    for module in list(inside.modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[leaf] = nn.Parameter(parameter.detach().clone())
    with pytest.raises(TieError, match="came apart"):
        verify(made)
    assert retie(made) == account


def test_names_lead_through_wrappers(adapted):
    made, _ = adapted
    inside = made.get_base_model()
    name = "encoder.layer.0.attention.self.query"
    assert type(submodule(inside, name)) in (nn.Linear, FactoredLinear)
    assert submodule(inside, name) is inside.get_submodule(name).base_layer
    assert submodule(inside, "") is inside


# --- unties


def maps(model):
    return [module for module in model.modules() if type(module) is nn.Linear]


def rounded_to_int8(model):
    """What torchao's ``Int8WeightOnlyConfig`` does: every linear map gets a new weight, rounded."""
    for module in maps(model):
        scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
        module.weight = nn.Parameter((module.weight / scale).round().mul(scale).detach())


def cut(model, *positions):
    """What Torch-Pruning does: the same neurons are taken from one position after the other, by new parameters."""
    for layer in (model.encoder.layer[position] for position in positions):
        first, second = layer.intermediate.dense, layer.output.dense
        first.weight, first.bias = nn.Parameter(first.weight[8:]), nn.Parameter(first.bias[8:])
        second.weight = nn.Parameter(second.weight[:, 8:])
        first.out_features = second.in_features = 24


def test_int8_unties_and_retie_mends_it(student, batch_for):
    before = verify(student)
    rounded_to_int8(student)
    outputs = output(student, batch_for("bert"))
    with pytest.raises(TieError) as caught:
        verify(student)
    named = [f"encoder.layer.1.{name}.weight" for name in ("attention.self.query", "output.dense")]
    assert all(name in caught.value.message for name in named)
    assert "and 4 more" in caught.value.message  # of 12, eight are named
    assert "retie" in caught.value.hint
    assert layershare.count(student).unique > before.counts.unique
    assert retie(student) == verify(student) == before
    assert torch.equal(output(student, batch_for("bert")), outputs)


def test_neurons_cut_alike_at_all_positions_can_be_tied_again(student, batch_for):
    before = verify(student)
    cut(student, 0, 1, 2, 3)
    outputs = output(student, batch_for("bert"))
    with pytest.raises(
        TieError, match=r"layer\.1\.intermediate\.dense\.weight.*layer\.3\.output\.dense\.weight"
    ):
        verify(student)
    after = retie(student)
    assert after.tied == before.tied
    assert after.counts.layer_unique == before.counts.layer_unique - 2 * 2 * 8 * 16 - 4 * 8
    assert torch.equal(output(student, batch_for("bert")), outputs)


@pytest.mark.parametrize("positions", [(1,), (0,), (1, 3), (2, 3)])
def test_neurons_cut_at_some_positions_only_are_never_passed_over(tiny, batch_for, positions):
    """The plan reads as if the positions had never been alike, and each had a group of its own."""
    model = shared(tiny("bert"), "all", batch_for("bert"))
    cut(model, *positions)
    with pytest.raises(TieError, match=r"intermediate\.dense\.weight.*came apart"):
        verify(model)
    with pytest.raises(TieError, match=r"is \[\d+, 16\], the shared tensor of .* they cannot be one.*alike"):
        retie(model)


def test_retie_takes_the_values_of_the_first_position(student):
    first, second = (student.encoder.layer[i].output.dense for i in (0, 1))
    second.weight = nn.Parameter(torch.zeros_like(second.weight))
    wanted = first.weight.clone()
    retie(student)
    assert second.weight is first.weight
    assert torch.equal(first.weight, wanted)


def test_what_assigns_the_weight_of_a_factored_map_is_stopped(tiny, batch_for):
    model = shared(tiny("bert"), "relaxed", batch_for("bert"))
    module = next(module for module in model.modules() if isinstance(module, FactoredLinear))
    with pytest.raises(TieError, match=r"cannot|no other can be assigned.*unshare"):
        module.weight = nn.Parameter(module.weight.detach().round())
    verify(model)


def test_the_real_torchao_unties_too(student):
    torchao = pytest.importorskip("torchao.quantization")
    before = verify(student)
    torchao.quantize_(student, torchao.Int8WeightOnlyConfig())
    with pytest.raises(TieError, match="came apart"):
        verify(student)
    assert retie(student).tied == before.tied


def test_the_real_torch_pruning_unties_too(student, batch_for):
    library = pytest.importorskip("torch_pruning")
    before = layershare.count(student).unique
    graph = library.DependencyGraph().build_dependency(
        student, {"input_ids": batch_for("bert")["input_ids"]}, output_transform=lambda out: out[0].sum()
    )
    for layer in student.encoder.layer:
        group = graph.get_pruning_group(
            layer.intermediate.dense, library.prune_linear_out_channels, idxs=list(range(8))
        )
        group.prune()
    assert layershare.count(student).unique > before  # cut, and larger
    with pytest.raises(TieError, match="came apart"):
        verify(student)
    assert retie(student).counts.unique < before


def test_unshared_models_are_left_alone(tiny, batch_for):
    model = shared(tiny("bert"), "adjacent", batch_for("bert"))
    dense = unshare(model)
    rounded_to_int8(dense)
    assert plan_of(dense) is None
    with pytest.raises(TieError, match="carries no sharing plan"):
        retie(dense)
