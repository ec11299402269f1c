"""Shared models on disk: stored once, loaded tied by every stock class, and never loaded wrong in silence."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import layershare
from laws import loss, mixed, output, plan_for, same
from layershare import make_plan, plan_of, share, verify
from layershare.errors import PlanError, StoreError
from layershare.linear import GATE, orders_of

AUTO = {
    "bert": "AutoModel",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModel",
}
PLANS = ["adjacent", "relaxed", "basis", "gated", "everything", "mixed"]


def shared(model, name, batch):
    plan = plan_for(model, name)
    return share(model, plan, calibration=[batch]), plan


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("embeddings", [True, False])
def test_save_load_save(tiny, batch_for, tmp_path, kind, name, embeddings):
    batch = batch_for(kind)
    student, plan = shared(tiny(kind, tie_word_embeddings=embeddings), name, batch)
    first, second = tmp_path / "first", tmp_path / "second"
    student.save_pretrained(first)
    for cls in (getattr(transformers, AUTO[kind]), type(student)):
        again = cls.from_pretrained(first)
        assert type(again) is type(student)
        assert same(again, student)
        assert torch.equal(output(again, batch), output(student, batch))
        assert verify(again) == verify(student)
        assert plan_of(again) == plan
        assert not again.training
    again.save_pretrained(second)
    assert {file.name for file in second.iterdir()} == {file.name for file in first.iterdir()}
    for file in sorted(path.name for path in first.iterdir()):
        assert (second / file).read_bytes() == (first / file).read_bytes(), file
    size = (first / "model.safetensors").stat().st_size
    header = int.from_bytes((first / "model.safetensors").read_bytes()[:8], "little") + 8
    assert size <= 1.02 * layershare.count(student).bytes_unique + header


def test_the_loaded_model_is_an_ordinary_one(tiny, tmp_path, batch_for):
    student, _ = shared(tiny("gpt2"), "mixed", batch_for("gpt2"))
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False)
    assert not hasattr(again, "hf_quantizer")
    assert again.all_tied_weights_keys == student.all_tied_weights_keys
    assert "_adjust_bias" not in again.__dict__
    assert not any(
        hasattr(module.config, "_is_quantized") for module in again.modules() if hasattr(module, "config")
    )
    assert all(parameter.requires_grad for parameter in again.parameters())
    loss(again.train(), batch_for("gpt2")).backward()


@pytest.mark.parametrize("name", ["adjacent", "mixed"])
def test_shards(tiny, batch_for, tmp_path, kind, name):
    student, _ = shared(tiny(kind), name, batch_for(kind))
    student.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    again = getattr(transformers, AUTO[kind]).from_pretrained(tmp_path)
    assert same(again, student)
    verify(again)
    stored = [name for shard in shards for name in load_file(shard)]
    assert len(stored) == len(set(stored)) == len([*student.parameters(), *orders_of(student)])


def test_heads_and_bases(tiny, batch_for, tmp_path):
    batch = batch_for("bert")
    base = tiny("bert")
    torch.manual_seed(3)
    headed = transformers.BertForSequenceClassification(base.config).eval()
    student, _ = shared(headed, "mixed", batch)
    student.save_pretrained(tmp_path / "headed")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "headed")
    assert torch.equal(output(bare, batch), output(student.bert, batch))
    verify(bare)
    bare.save_pretrained(tmp_path / "bare")
    once_more = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    verify(once_more)
    assert same(once_more.bert.encoder, student.bert.encoder)


def test_other_precisions(tiny, batch_for, tmp_path, kind):
    student, _ = shared(tiny(kind), "mixed", batch_for(kind))
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path, dtype=torch.bfloat16)
    verify(again)
    assert same(again, student.to(torch.bfloat16))


def test_a_model_with_dropped_positions_only_needs_no_layershare(tiny, batch_for, tmp_path):
    student, _ = shared(tiny("bert"), "drop", batch_for("bert"))
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & config.keys()


def test_checkpoints_of_the_trainer(tiny, batch_for, tmp_path):
    student, plan = shared(tiny("gpt2"), "mixed", batch_for("gpt2"))
    ids = batch_for("gpt2")["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    options = transformers.TrainingArguments(
        tmp_path, max_steps=2, save_steps=1, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    before = student.state_dict()["transformer.wte.weight"].clone()
    transformers.Trainer(student, options, train_dataset=rows).train()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert not torch.equal(before, student.state_dict()["transformer.wte.weight"])
    assert same(again, student)
    verify(again, plan)
    resumed, _ = shared(tiny("gpt2"), "mixed", batch_for("gpt2"))
    transformers.Trainer(resumed, options, train_dataset=rows).train(str(tmp_path / "checkpoint-1"))
    verify(resumed, plan)
    assert same(resumed, student)


# --- nothing loads wrong in silence


@pytest.fixture
def folder(tiny, batch_for, tmp_path) -> Path:
    student, _ = shared(tiny("bert"), "mixed", batch_for("bert"))
    student.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path):
    return transformers.AutoModel.from_pretrained(folder)


LOSSES = {
    "an owner": "encoder.layer.0.attention.self.query.base",
    "a tied bias": "encoder.layer.0.attention.self.query.bias",
    "a private bias": "encoder.layer.2.attention.self.query.bias",
    "a private factor": "encoder.layer.0.attention.self.query.down",
    "a shared factor": "encoder.layer.1.output.dense.up",
    "a factor of one position": "encoder.layer.2.attention.output.dense.up",
    "a private weight": "encoder.layer.0.intermediate.dense.weight",
    "a private norm": "encoder.layer.2.output.LayerNorm.weight",
    "a gate": f"encoder.layer.1.{GATE}",
}


@pytest.mark.parametrize("what", LOSSES)
def test_a_lost_tensor_is_named(folder, what):
    tensors = load_file(folder / "model.safetensors")
    del tensors[LOSSES[what]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        StoreError, match=rf"{folder}/model\.safetensors: the checkpoint lacks {LOSSES[what]}"
    ):
        load(folder)


def test_a_lost_tensor_of_a_stack_that_is_not_shared_is_named(tiny, tmp_path):
    model = tiny("t5")
    share(model, make_plan(model, "all", stack="decoder.block")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match=r"encoder.block.1.layer.0.SelfAttention.q.weight"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


def test_a_member_stored_beside_its_owner_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.base"
    save_file(tensors | {name: torch.randn(16, 16)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match=f"its own {name}"):
        load(folder)


def test_a_member_stored_in_place_of_its_owner_serves_all(folder):
    before, tensors = load(folder), load_file(folder / "model.safetensors")
    owner, member = (f"encoder.layer.{i}.attention.self.query.base" for i in (0, 1))
    tensors[member] = tensors.pop(owner)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert same(load(folder), before)
    verify(load(folder))


@pytest.mark.parametrize("kept", [-100, 100, 0])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_truncated_file_is_named(tiny, batch_for, tmp_path, kept, shards):
    student, _ = shared(tiny("bert"), "mixed", batch_for("bert"))
    student.save_pretrained(tmp_path, **({} if shards == 1 else {"max_shard_size": "8KB"}))
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(StoreError, match=rf"{file}: cut off or broken .* Save or download it again"):
        load(tmp_path)


def test_a_missing_shard_is_named(tiny, batch_for, tmp_path):
    student, _ = shared(tiny("bert"), "mixed", batch_for("bert"))
    student.save_pretrained(tmp_path, max_shard_size="8KB")
    (file := sorted(tmp_path.glob("*.safetensors"))[1]).unlink()
    with pytest.raises(StoreError, match=f"{file}: there is no such file.* Save or download it again"):
        load(tmp_path)


CHANGES = {
    "cut": (lambda t: t[:, :-1], "has shape"),
    "an axis more": (lambda t: t[None], "has shape"),
    "integers": (lambda t: t.to(torch.int32), "of type I32, the model is of float32"),
    "truth values": (lambda t: t > 0, "of type BOOL, the model is of float32"),
    "half": (lambda t: t.half(), "of type F16, the model is of float32"),
    "double": (lambda t: t.double(), "of type F64, the model is of float32"),
}
TENSORS = ["an owner", "a shared factor", "a private factor", "a private weight"]


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("tensor", TENSORS)
def test_a_tensor_of_wrong_shape_or_type_is_named(folder, what, tensor):
    change, words = CHANGES[what]
    file, name = folder / "model.safetensors", LOSSES[tensor]
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(StoreError, match=rf"{file}: {name} .*{words}"):
        load(folder)


def test_types_may_be_mixed_as_transformers_mixes_them(tiny, batch_for, tmp_path):
    """Full precision for what is delicate; and any type may be asked for."""
    student, _ = shared(tiny("bert"), "mixed", batch_for("bert"))
    student.to(torch.bfloat16).encoder.layer[0].output.LayerNorm.float()
    student.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert {
            p.dtype for p in transformers.AutoModel.from_pretrained(tmp_path, dtype=dtype).parameters()
        } == {dtype}


def test_a_type_that_most_weights_have_is_the_model_s(tiny, batch_for, tmp_path):
    """transformers writes the type of the first parameter into the config, whatever the others have."""
    student, _ = shared(tiny("bert"), "mixed", batch_for("bert"))
    student.to(torch.bfloat16).embeddings.float()
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    verify(load(tmp_path))


def test_a_head_of_another_size_is_the_choice_of_the_user(tiny, batch_for, tmp_path):
    model = transformers.BertForSequenceClassification(tiny("bert").config).eval()
    student, _ = shared(model, "mixed", batch_for("bert"))
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    verify(again)
    assert again.classifier.out_features == 5
    assert same(again.bert, student.bert)


def test_half_of_a_model_loads_with_its_half_of_the_plan(tiny, batch_for, tmp_path):
    student, _ = shared(tiny("t5"), "mixed", batch_for("t5"))
    student.save_pretrained(tmp_path)
    half = transformers.T5EncoderModel.from_pretrained(tmp_path)
    assert [one.name for one in plan_of(half).stacks] == ["encoder.block"]
    assert same(half.encoder, student.encoder)
    ids = batch_for("t5")["input_ids"]
    with (
        torch.no_grad()
    ):  # up to rounding: where tensors lie in a file is not where kernels are at their best
        torch.testing.assert_close(half(ids).last_hidden_state, student.encoder(ids).last_hidden_state)
    assert verify(student).tied > verify(half).tied > 0
    half.save_pretrained(tmp_path / "half")
    verify(transformers.T5EncoderModel.from_pretrained(tmp_path / "half"))
    with pytest.raises(StoreError, match=r"the checkpoint lacks decoder\.block"):
        transformers.AutoModel.from_pretrained(tmp_path / "half")  # a whole T5Model


def test_a_stack_that_the_plan_misspells_is_not_half_a_model(tiny, batch_for, tmp_path):
    student, _ = shared(tiny("t5"), "mixed", batch_for("t5"))
    student.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace("decoder.block", "decoder.blocks")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StoreError, match=r"the checkpoint has its own|the checkpoint lacks decoder\.block"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("what", ["model", "text"])
def test_pickles_are_refused(folder, what):
    if what == "model":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    else:  # not even opened
        (folder / "pytorch_model.bin").write_text("no pickle")
    (folder / "model.safetensors").unlink()
    with pytest.raises(StoreError, match=r"pytorch_model.bin.*safetensors files only.*save_pretrained"):
        load(folder)


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=rf"no file named model\.safetensors.*{folder}"):
        load(folder)


CONFIGS = {
    "another depth": (
        PlanError, r"config\.json: .* has 6 layers, the plan is for 3", lambda c, _: c.update(num_hidden_layers=6),
    ),
    "no plan": (StoreError, r"config\.json: .*no plan", lambda _, q: q.pop("plan")),
    "an empty plan": (StoreError, r"config\.json: .*no plan", lambda _, q: q.update(plan={})),
    "newer": (PlanError, r"config\.json: .*format version 9.*upgrade", lambda _, q: q["plan"].update(version=9)),
    "misspelt": (PlanError, r"config.json.*'stakcs'.*'stacks'", lambda _, q: q["plan"].update(stakcs=[])),
    "another stack": (
        PlanError, r"config\.json: .*no stack 'layers'", lambda _, q: q["plan"]["stacks"][0].update(name="layers"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_a_wrong_config_is_named(folder, what):
    error, words, change = CONFIGS[what]
    config = json.loads((folder / "config.json").read_text())
    change(config, config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        load(folder)


def test_every_way_to_save_sets_the_trap(folder, tmp_path):
    again = load(folder)
    again.config.save_pretrained(tmp_path / "config of a model")
    again.config.save_pretrained(tmp_path / "and again")
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "config alone")
    again.save_pretrained(tmp_path / "model")
    layershare.unshare(again).config.save_pretrained(tmp_path / "unshared with gates")
    for config in tmp_path.glob("*/config.json"):
        assert json.loads(config.read_text())["transformers_weights"].startswith(
            "this-model-needs--import-layershare"
        )
    assert len(list(tmp_path.glob("*/config.json"))) == 5
    assert "transformers_weights" not in again.config.to_dict()


def test_nothing_is_logged_about_a_good_folder(folder, caplog):
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING, "transformers"):
        load(folder)
    transformers.utils.logging.disable_propagation()
    assert not caplog.records


REFUSED = """
import sys, transformers
for cls in transformers.AutoModel, transformers.BertModel, transformers.BertForSequenceClassification:
    try:
        cls.from_pretrained(sys.argv[1])
    except Exception as error:
        assert "import-layershare" in str(error), error
    else:
        sys.exit(f"{cls.__name__} loaded it")
assert "layershare" not in sys.modules
import layershare
print(layershare.verify(transformers.AutoModel.from_pretrained(sys.argv[1])))
"""
WELCOME = """
import sys, layershare
assert "torch" not in sys.modules
share = layershare.share  # the first thing that needs transformers
from transformers import BertModel
print(layershare.verify(BertModel.from_pretrained(sys.argv[1])))
"""


@pytest.mark.parametrize("script", [REFUSED, WELCOME], ids=["without the import", "with the import"])
def test_a_fresh_process(folder, script):
    path = os.pathsep.join([str(Path(layershare.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert str(verify(load(folder))) in run.stdout


def test_a_pipeline_loads_it(tiny, batch_for, tmp_path, tokenizer):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(tiny("bert").config).eval()
    student = share(model, mixed(model), calibration=[batch_for("bert")])
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-classification", str(tmp_path), device="cpu")
    verify(pipe.model)
    assert same(pipe.model, student)
    assert 0 < pipe("the cat sits")[0]["score"] < 1
