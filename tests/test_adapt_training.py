"""Training adapters: the loss in closed form, exact resuming, and from folder to folder."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from datasets import Dataset

import layershare
from layershare.errors import DependencyError, ModelError, OptionError
from layershare.tasks import get_task
from layershare.tasks.encoding import pad
from layershare.train import TrainConfig

pytest.importorskip("peft")

from layershare.adapt import AdaptConfig, MatchConfig, adapt, fit, load, match, output_matching
from layershare.adapt.base import bare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")


def half(model):
    return layershare.share(model, layershare.make_plan(model, "adjacent", unique=2))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- the loss


def test_output_matching_is_half_the_sum_of_squares():
    small = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    large = torch.tensor([[0.0, 4.0], [3.0, -1.0]], requires_grad=True)
    loss = output_matching(small, large)
    assert loss.item() == (1 + 4 + 9 + 0) / 2
    loss.backward()
    assert torch.equal(small.grad, (small - large).detach())
    assert large.grad is None
    assert output_matching(small, small).item() == 0


def test_what_is_masked_does_not_count_whatever_it_holds():
    small = torch.tensor([[[1.0, 2.0], [torch.nan, torch.inf]]])
    large = torch.zeros(1, 2, 2)
    assert output_matching(small, large, torch.tensor([[1, 0]])).item() == 2.5


# ---- fit


@pytest.fixture
def dataset():
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 27, (4,), generator=draw).tolist() for _ in range(12)]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 4 for _ in ids]})


def to_one(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return {"a": (model(**inputs).last_hidden_state[..., 0] - 1).square().mean()}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_was_killed_ends_with_the_same_bits(tiny, tokenizer, dataset, tmp_path, ema):
    config = TrainConfig(steps=6, batch_size=4, learning_rate=1e-2, save_every=2, seed=1, ema_decay=ema)
    settings = AdaptConfig(method="lora", dropout=0.1)
    calls = 0

    def broken(model, batch):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise RuntimeError("killed")
        return to_one(model, batch)

    def run(loss, out):
        adapted = adapt(half(tiny("bert")), settings)
        history = fit(adapted, dataset, lambda rows: pad(tokenizer, rows), loss, config, out, quiet=True)
        return weights(adapted), history

    whole, history = run(to_one, tmp_path / "a")
    with pytest.raises(RuntimeError, match="killed"):
        run(broken, tmp_path / "b")
    resumed, again = run(to_one, tmp_path / "b")
    assert same(whole, resumed)
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in again]
    assert history[-1]["loss"] < history[0]["loss"]
    checkpoint = next((tmp_path / "a" / "checkpoints").glob("checkpoint-6")) / "model.safetensors"
    assert checkpoint.stat().st_size < 4 * sum(value.numel() for value in whole.values()) + 10_000


# ---- match


def test_a_large_model_is_matched_without_labels(tiny, tokenizer, pairs_file, tmp_path):
    task = get_task("sentence-embedding")
    data = task.read([pairs_file])
    large = tiny("bert", seed=1, hidden_size=16, num_hidden_layers=6)
    small = half(tiny("bert"))
    before = {name: value.clone() for name, value in small.state_dict().items()}
    adapted = adapt(small, AdaptConfig(method="houlsby", size=8, share="group"))
    config = MatchConfig(steps=12, batch_size=16, learning_rate=1e-2, max_length=16)
    history = match(adapted, large, tokenizer, task, data, config, tmp_path, quiet=True)
    assert history[-1]["match"] < 0.7 * history[0]["match"]
    assert all(torch.equal(value, before[name]) for name, value in bare(adapted).state_dict().items())
    layershare.verify(adapted)


def test_models_that_do_not_fit_each_other_are_refused(tiny, tokenizer, pairs_file, tmp_path):
    task = get_task("sentence-embedding")
    data = task.read([pairs_file])
    adapted = adapt(tiny("bert"), AdaptConfig(method="lora"))
    config = MatchConfig(steps=1, batch_size=4)
    with pytest.raises(ModelError, match="vocabularies"):
        match(adapted, tiny("bert", vocab_size=30), tokenizer, task, data, config, tmp_path, quiet=True)
    wide = tiny("bert", hidden_size=32)
    with pytest.raises(ModelError, match="differ in size"):
        match(adapted, wide, tokenizer, task, data, config, tmp_path / "b", quiet=True)


# ---- folders and the command line


@pytest.fixture
def labelled(tmp_path):
    words = {"good": "cat dog sings plays", "bad": "car sits park house"}
    rows = [f"{a} the {b},{label}" for label, ws in words.items() for a in ws.split() for b in ws.split()]
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return file


def test_the_verb_trains_on_labels_and_saves_an_adapter_folder(tiny, tokenizer, labelled, tmp_path, capsys):
    from layershare import cli

    config = copy.deepcopy(tiny("bert").config)
    config.id2label, config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    torch.manual_seed(0)
    base = half(transformers.BertForSequenceClassification(config).eval())
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = [
        "adapt",
        tmp_path / "base",
        "--task",
        "text-classification",
        "--data",
        labelled,
        "--method",
        "lora",
    ]
    out = tmp_path / "out"
    code = cli.main([str(word) for word in (*words, "--per-group", "--steps", "4", "-o", out)])
    assert (code, capsys.readouterr().out.count("Saved in")) == (0, 1)
    names = {file.name for file in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"model.safetensors", "checkpoints"} & names
    loaded = load(base, out)
    batch = {"input_ids": torch.tensor([[2, 6, 7, 3]])}
    with torch.no_grad():
        assert not torch.equal(loaded(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("dropout", [False, True])
def test_labels_are_learnt_with_dropout_where_it_is_asked_for(tiny, tokenizer, labelled, tmp_path, dropout):
    from layershare.adapt.labels import learn

    kind, modes = get_task("text-classification"), []

    def forward(model, batch, **options):
        modes.append(model.model.training)
        return kind.forward(model, batch, **options)

    config = copy.deepcopy(tiny("bert").config)
    config.label2id = {"bad": 0, "good": 1}
    adapted = adapt(transformers.BertForSequenceClassification(config), AdaptConfig(method="lora"))
    training = MatchConfig(steps=2, batch_size=4, dropout=dropout)
    task = replace(kind, forward=forward)
    learn(adapted, tokenizer, task, kind.read(labelled), training, tmp_path / "out", quiet=True)
    assert set(modes) == {dropout}


def test_a_task_without_labels_needs_a_teacher(bert_folder, pairs_file, tmp_path):
    from layershare.adapt.folder import adapt_folder

    with pytest.raises(OptionError, match="no labels"):
        adapt_folder(bert_folder, "sentence-embedding", [pairs_file], tmp_path / "out")
    training = MatchConfig(steps=2, batch_size=4)
    adapt_folder(
        bert_folder, "sentence-embedding", [pairs_file], tmp_path / "out", teacher=bert_folder, training=training
    )  # fmt: skip
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_without_peft_the_extra_is_named(tiny, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match=r"layershare\[adapt\]"):
        adapt(tiny("bert"))
