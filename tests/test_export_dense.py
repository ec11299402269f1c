"""The dense form: a stock folder with the same outputs, or a clear no."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from laws import gates_only, output, plan_for
from layershare import cli, find_stacks, share
from layershare.errors import ModelError, OptionError, StoreError
from layershare.export import dense as room
from layershare.export import export
from layershare.linear import FactoredLinear
from layershare.sharing.gate import has_gate

SIZES = dict(vocab_size=27, hidden_size=16, num_hidden_layers=4)
NEOX = SIZES | dict(num_attention_heads=2, intermediate_size=32)


def saved(model, plan, folder, batch=None):
    student = share(model, plan, calibration=[batch] if batch else None)
    student.save_pretrained(folder)
    return student


def stock(folder, like):
    """As transformers alone would: no plan, no gate, no factor, no parameter twice."""
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & config.keys()
    model = type(like).from_pretrained(folder).eval()
    assert not any(isinstance(module, FactoredLinear) or has_gate(module) for module in model.modules())
    assert not any(stack.tied for stack in find_stacks(model))
    return model


@pytest.mark.parametrize("name", ["adjacent", "relaxed", "basis", "everything"])
def test_the_outputs_stay_and_the_bytes_are_told(tiny, batch_for, tmp_path, kind, name):
    model, batch = tiny(kind), batch_for(kind)
    student = saved(model, plan_for(model, name), tmp_path / "shared", batch)
    made = export(tmp_path / "shared", tmp_path / "dense")
    again = stock(tmp_path / "dense", student)
    torch.testing.assert_close(output(again, batch), output(student, batch), atol=1e-4, rtol=1e-4)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("shared", "dense")]
    assert [made.bytes_before, made.bytes_after] == sizes
    assert made.cost == sizes[1] - sizes[0] > 0
    assert f"{made.cost:,} bytes" in str(made)
    assert made.difference is not None
    assert made.difference < 1e-4


SCRIPT = """
import sys, torch, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([[5, 6, 7, 8]])
with torch.no_grad():
    torch.save(model(input_ids=ids)[0], sys.argv[2])
assert "layershare" not in sys.modules
"""


def test_it_needs_no_layershare(tiny, batch_for, tmp_path):
    model = tiny("bert")
    student = saved(model, plan_for(model, "relaxed"), tmp_path / "shared", batch_for("bert"))
    export(tmp_path / "shared", tmp_path / "dense")
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "dense"), str(tmp_path / "out.pt")]
    run = subprocess.run(command, capture_output=True, text=True, env=without, check=False)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(
        torch.load(tmp_path / "out.pt"), output(student, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
    )


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_gates_of_one_go_and_gates_of_zero_take_their_position_along(tiny, batch_for, tmp_path, kind):
    model, batch = tiny(kind), batch_for(kind)
    student = saved(model, gates_only(model, 1, 0, 1, 0), tmp_path / "shared")
    made = export(tmp_path / "shared", tmp_path / "dense")
    again = stock(tmp_path / "dense", student)
    assert find_stacks(again)[0].length == 2
    assert torch.equal(output(again, batch), output(student, batch)) or made.difference < 1e-6
    assert made.cost < 0
    assert f"this saves {-made.cost / 1e6:,.1f} MB ({-made.cost:,} bytes)" in str(made)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_gate_in_between_is_refused_where_no_dense_form_exists(tiny, batch_for, tmp_path, kind):
    """Post-norm (BERT), or one branch behind the other (all others)."""
    model = tiny(kind)
    student = saved(model, gates_only(model, 1, 0.5), tmp_path / "shared")
    first = f"{find_stacks(student)[0].name}.1"
    with pytest.raises(
        ModelError, match=f"{first} has a gate of 0.5, for which there is no dense form.*basis"
    ):
        export(tmp_path / "shared", tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def parallel(**more):
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**NEOX, **more)).eval()


def one_branch():
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(**SIZES, state_size=4, time_step_rank=4)
    ).eval()


@pytest.mark.parametrize("make", [parallel, one_branch])
def test_a_gate_in_between_is_folded_where_all_branches_read_the_input(batch_for, tmp_path, make):
    batch = batch_for("gpt2")
    with torch.no_grad():  # so that every branch counts
        for parameter in (model := make()).parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    student = saved(model, gates_only(model, 1, 0.5, 0.25, 1.5), tmp_path / "shared")
    export(tmp_path / "shared", tmp_path / "dense")
    again = stock(tmp_path / "dense", student)
    torch.testing.assert_close(output(again, batch), output(student, batch), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(output(model, batch), output(student, batch), atol=1e-2)


def test_the_same_class_with_its_branches_in_a_row_is_refused(tmp_path):
    model = parallel(use_parallel_residual=False)
    saved(model, gates_only(model, 0.5), tmp_path / "shared")
    with pytest.raises(ModelError, match=r"layers\.0 has a gate of 0\.5"):
        export(tmp_path / "shared", tmp_path / "dense")


def test_a_position_that_cannot_be_left_out_is_named(tiny, tmp_path):
    model = tiny("t5")
    saved(model, gates_only(model, 0), tmp_path / "shared")  # its table of relative positions serves all
    with pytest.raises(
        ModelError,
        match=r"gates of 0 skip positions \[0\] of 'encoder.block'.*has_relative_attention_bias is False",
    ):
        export(tmp_path / "shared", tmp_path / "dense")


def test_a_form_that_differs_is_not_kept(tiny, tmp_path, monkeypatch):
    def wrong(model):
        dense = room.unshare(model)
        with torch.no_grad():
            dense.embeddings.word_embeddings.weight.copy_(dense.embeddings.word_embeddings.weight.flip(0))
        return dense

    model = tiny("bert")
    saved(model, plan_for(model, "adjacent"), tmp_path / "shared")
    monkeypatch.setattr(room, "densify", wrong)
    with pytest.raises(StoreError, match="differs from it by"):
        export(tmp_path / "shared", tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_the_verb(tiny, tokenizer, tmp_path, capsys):
    model = tiny("bert").to(torch.bfloat16)
    saved(model, plan_for(model, "adjacent"), tmp_path / "shared")
    tokenizer.save_pretrained(tmp_path / "shared")
    words = ["export", str(tmp_path / "shared"), "-o", str(tmp_path / "dense"), "--format"]
    assert cli.main([*words, "dense", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["cost"] == data["bytes_after"] - data["bytes_before"] > 0
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert cli.main([*words, "dens"]) == 2
    assert "unknown format 'dens'. Did you mean 'dense'?" in capsys.readouterr().err
    assert cli.main([*words, "dense"]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_what_is_not_shared_is_dense_already(bert_folder, tmp_path):
    with pytest.raises(ModelError, match="is not shared: it is a dense model already"):
        export(bert_folder, tmp_path / "dense")
    with pytest.raises(OptionError, match="unknown format"):
        export(bert_folder, tmp_path / "dense", "gguf")
    assert not list(tmp_path.iterdir())
