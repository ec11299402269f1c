"""encode: the tensors are those of the model, under any head, shared or not, and what is drawn is what was computed."""

import base64
import json
import re
import zlib

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, BertForMaskedLM, BertForSequenceClassification

import layershare
from layershare import cli
from layershare.analyse.draw import attention_svg, save_attention
from layershare.errors import ModelError, OptionError

TEXT = "the cat sits on a mat"


@pytest.fixture
def saved(tiny, tokenizer, tmp_path):
    def save(kind, model=None):
        folder = tmp_path / kind
        (model or tiny(kind)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def reference(folder, ids):
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_tensors_are_those_of_transformers(saved, kind):
    folder = saved(kind)
    found = layershare.encode(TEXT, folder)
    assert found.tokens == ("[CLS]", "the", "cat", "sits", "on", "a", "mat", "[SEP]")
    theirs = reference(folder, found.ids)
    torch.testing.assert_close(found.tensors["last_hidden_state"], theirs.last_hidden_state[0])
    for i, value in enumerate(theirs.hidden_states):
        torch.testing.assert_close(found.tensors[f"hidden_states.{i}"], value[0])
    assert list(found.attentions) == [f"attentions.{i}" for i in range(4)]
    for i, value in enumerate(theirs.attentions):
        torch.testing.assert_close(found.attentions[f"attentions.{i}"], value[0])
        torch.testing.assert_close(found.attentions[f"attentions.{i}"].sum(-1), torch.ones(2, 8))
    if kind == "bert":
        assert found.pooling == "pooler"
        torch.testing.assert_close(found.tensors["pooled"], theirs.pooler_output[0])
    else:
        assert found.pooling == "mean"
        torch.testing.assert_close(found.tensors["pooled"], theirs.last_hidden_state[0].mean(0))


def test_an_encoder_decoder_shows_both_sides_and_the_attention_between(saved):
    found = layershare.encode(TEXT, saved("t5"))
    shapes = {name: tuple(value.shape) for name, value in found.tensors.items()}
    assert shapes["encoder_hidden_states.4"] == (8, 16)
    assert shapes["decoder_hidden_states.4"] == (1, 16)
    assert shapes["encoder_attentions.0"] == (2, 8, 8)
    assert shapes["cross_attentions.3"] == (2, 1, 8)
    assert shapes["pooled"] == (16,)


def test_a_decoder_may_start_with_token_0(saved, tiny):
    folder = saved("t5", tiny("t5", pad_token_id=1))
    found = layershare.encode(TEXT, folder)
    start = AutoModel.from_pretrained(folder).shared.weight[:1].detach()
    torch.testing.assert_close(found.tensors["decoder_hidden_states.0"], start)


def test_no_pooler_is_drawn_at_random(saved, tiny):
    config = tiny("bert").config
    torch.manual_seed(0)
    without = saved("masked", BertForMaskedLM(config))
    first, second = (layershare.encode(TEXT, without) for _ in range(2))
    assert first.pooling == "mean"
    assert torch.equal(first.tensors["pooled"], second.tensors["pooled"])
    assert (
        layershare.encode(TEXT, saved("labelled", BertForSequenceClassification(config))).pooling == "pooler"
    )


def test_a_shared_model_is_read_as_it_computes(saved, tiny):
    folder = saved("bert")
    student = layershare.share(AutoModel.from_pretrained(folder), layershare.make_plan(tiny("bert"), "all"))
    shared = saved("shared", student)
    found = layershare.encode(TEXT, shared)
    with torch.no_grad():
        theirs = student.eval()(torch.tensor([found.ids]))
    torch.testing.assert_close(found.tensors["last_hidden_state"], theirs.last_hidden_state[0])


def test_json_and_safetensors_hold_all_of_it(saved, tmp_path, capsys):
    folder, file = saved("bert"), tmp_path / "x" / "a.safetensors"
    assert cli.main(["encode", TEXT, "--model", str(folder), "-o", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = layershare.encode(TEXT, folder)
    assert told["tokens"] == list(found.tokens)
    with safe_open(file, "pt") as stored:
        assert stored.metadata()["text"] == TEXT
        assert stored.get_tensor("input_ids").tolist() == list(found.ids)
        assert set(stored.keys()) == {"input_ids", *found.tensors}
        for name, value in found.tensors.items():
            assert torch.equal(stored.get_tensor(name), value)
            assert told["tensors"][name]["shape"] == list(value.shape)
            torch.testing.assert_close(torch.tensor(told["tensors"][name]["values"]), value)
    with pytest.raises(OptionError, match=r"written as \.safetensors"):
        found.save(tmp_path / "a.bin")


def test_the_table_names_every_tensor(saved, capsys):
    folder = saved("gpt2")
    assert cli.main(["encode", TEXT, "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    for name, value in layershare.encode(TEXT, folder).tensors.items():
        assert re.search(rf"^{re.escape(name)} +{'x'.join(map(str, value.shape))} ", out, re.MULTILINE)
    assert "cat(" in out
    assert "no pooler of its own" in out


def test_the_picture_is_of_the_values(tmp_path):
    maps = {"attentions.0": torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[1.0, 0.0], [0.25, 0.75]]])}
    picture = attention_svg(maps, ["a", "<b>"], "a & b")
    images = re.findall(r"base64,([\w+/=]+)", picture)
    assert len(images) == 2
    assert "&lt;b&gt;" in picture
    assert "a &amp; b" in picture
    raw = base64.b64decode(images[0])
    at = raw.index(b"IDAT")
    rows = zlib.decompress(raw[at + 4 : at + 4 + int.from_bytes(raw[at - 4 : at])])
    half = [round((255 + dark) / 2) for dark in (16, 44, 110)]
    assert list(rows[:7]) == [0, 255, 255, 255, 16, 44, 110]
    assert all(abs(a - b) <= 1 for a, b in zip(rows[8:11], half, strict=True))
    with pytest.raises(OptionError, match=r"drawn as \.svg"):
        save_attention(maps, ["a", "b"], tmp_path / "a.png")
    with pytest.raises(OptionError, match="no attention maps"):
        save_attention({}, [], tmp_path / "a.svg")


def test_what_is_no_text_is_refused(bert_folder, saved, tiny):
    with pytest.raises(OptionError, match="text is empty"):
        layershare.encode("  ", bert_folder)
    with pytest.raises(ModelError):
        layershare.encode(TEXT, "./nowhere")
    with pytest.raises(ModelError, match="vit model does not read text"):
        layershare.encode(TEXT, saved("vit"))
