"""Fine-tuning: heads, labels, early stopping with the best state kept, ties, and runs that survive being killed."""

import json
import os
import random
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import layershare
from layershare import finetune as module
from layershare.errors import DataError, LayershareError, ModelError, OptionError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.best import Best
from layershare.result import Result
from layershare.tasks import get_task

CONFIG = FinetuneConfig(epochs=8, batch_size=16, learning_rate=1e-2, patience=0, seed=1)
WORDS = ["the", "man", "woman", "bird", "sits", "runs", "plays", "sings", "on", "in", "mat", "park"]
SIGNS = {"animal": ["cat", "dog"], "colour": ["red", "blue"], "thing": ["guitar", "house"]}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """180 sentences whose label follows from one word of theirs."""
    draw = random.Random(0)
    rows = ["text,label"]
    for number in range(180):
        label = list(SIGNS)[number % 3]
        words = draw.choices(WORDS, k=7)
        words[draw.randrange(7)] = draw.choice(SIGNS[label])
        rows.append(f"{' '.join(words)},{label}")
    file = tmp_path_factory.mktemp("labelled") / "labelled.csv"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def folder(tiny, tokenizer, tmp_path):
    """``folder("bert", share=True)``: a saved tiny model with its tokenizer."""

    def save(kind, share=False, **sizes):
        model = tiny(kind, **sizes)
        if share:
            model = layershare.share(model, layershare.make_plan(model, "cycle", unique=2))
        model.save_pretrained(tmp_path / f"{kind}-start")
        tokenizer.save_pretrained(tmp_path / f"{kind}-start")
        return tmp_path / f"{kind}-start"

    return save


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_shared_encoder_learns_names_its_labels_and_stays_tied(folder, labelled, tmp_path):
    out = tmp_path / "out"
    result = finetune(folder("bert", share=True), labelled, out, config=CONFIG, quiet=True)
    before, after = result.models
    assert after.metrics["accuracy"] > max(0.6, before.metrics["accuracy"])
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "animal", 1: "colour", 2: "thing"}
    assert layershare.verify(model).tied > 0
    assert after.layer_parameters_unique < after.layer_parameters_effective
    stored = load_file(out / "model.safetensors")
    assert sum(value.numel() for value in stored.values()) == sum(p.numel() for p in model.parameters())
    assert Result.load(out) == result
    assert not (out / "checkpoints").exists()
    assert not (tmp_path / "out.part").exists()
    # The saved model is the best one: it has the figure that the history says is the highest.
    data = get_task("text-classification").read(labelled, seed=CONFIG.seed)
    found = get_task("text-classification").evaluate(
        model, AutoTokenizer.from_pretrained(out), data.validation
    )
    judged = [entry["validation_accuracy"] for entry in result.history if "validation_accuracy" in entry]
    assert found["accuracy"] == max(judged)
    assert f"{max(judged):.4f}" in result.notes[-2]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_decoders_and_encoder_decoders_get_a_head_too(folder, labelled, tmp_path, kind):
    config = CONFIG.model_copy(update={"steps": 3})
    result = finetune(folder(kind), labelled, tmp_path / "out", config=config, quiet=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 3
    assert model.config.pad_token_id == 0
    assert result.models[1].metrics.keys() == {"accuracy", "macro_f1", "matthews"}


# ---- early stopping


class _State:
    def __init__(self, figures):
        self.global_step, self.max_steps, self.log_history = 0, 100, []
        self.is_world_process_zero = True
        self.figures = figures


class _Control:
    should_log = should_save = should_training_stop = False


class _Arguments:
    def __init__(self, folder):
        self.output_dir = str(folder)


def run_best(tmp_path, figures, patience, history=()):
    """Feed ``figures`` to Best, one every 10 steps; the weight is the step. Returns (best, the step it stopped at)."""
    model = torch.nn.Linear(1, 1, bias=False)
    state, control, arguments = _State(figures), _Control(), _Arguments(tmp_path)
    state.log_history = list(history)
    given = iter(figures)
    best = Best(lambda _: {"accuracy": next(given)}, "accuracy", True, 10, patience)
    best.on_train_begin(arguments, state, control)
    for step in range(10 * len(history) + 1, 101):
        state.global_step, control.should_log, control.should_save = step, False, False
        with torch.no_grad():
            model.weight.fill_(step)
        best.on_step_end(arguments, state, control)
        if control.should_log:
            state.log_history.append({"loss": 1.0, "step": step})
            best.on_log(arguments, state, control, model=model, logs={"loss": 1.0})
        if control.should_save:
            best.on_save(arguments, state, control)
        if control.should_training_stop:
            break
    best.restore(model)
    return best, step, model.weight.item(), state.log_history


def test_the_best_is_kept_and_patience_ends_the_run(tmp_path):
    figures = [0.5, 0.7, 0.7, 0.6, 0.65, 0.9]
    best, stopped, weight, _ = run_best(tmp_path, figures, patience=3)
    assert (best.step, best.value, stopped, weight) == (20, 0.7, 50, 20.0)  # the first of equals
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-20.safetensors"]


def test_a_resumed_run_remembers_the_best_and_its_patience(tmp_path):
    figures = [0.5, 0.7, 0.7, 0.6, 0.65, 0.9]
    *_, history = run_best(tmp_path, figures, patience=3)
    best, stopped, weight, _ = run_best(tmp_path, figures[3:], patience=3, history=history[:3])
    assert (best.step, stopped, weight) == (20, 50, 20.0)
    best, stopped, weight, _ = run_best(tmp_path, [], patience=3, history=history)
    assert (best.step, best.last, weight) == (20, 50, 20.0)
    assert stopped == 51  # nothing is judged any more


def test_fewer_rows_are_chosen_on_but_all_are_judged(folder, labelled, tmp_path):
    task, sizes = get_task("text-classification"), []

    def evaluate(model, tokenizer, dataset, **options):
        sizes.append(len(dataset))
        return task.evaluate(model, tokenizer, dataset, **options)

    config = CONFIG.model_copy(update={"steps": 4, "judge_every": 2, "judge_rows": 5})
    finetune(
        folder("bert"), labelled, tmp_path / "out", task=replace(task, evaluate=evaluate), config=config, quiet=True
    )  # fmt: skip
    held = len(task.read(labelled, seed=CONFIG.seed).test)
    assert sizes[0] == sizes[-1] == held > 5
    assert set(sizes[1:-1]) == {5}


def test_no_patience_goes_on_to_the_end(tmp_path):
    figures = [0.9, *[0.1] * 8, 0.95]
    best, stopped, weight, _ = run_best(tmp_path, figures, patience=0)
    assert (best.step, stopped, weight) == (100, 100, 100.0)


def test_a_run_that_stops_early_says_so(folder, labelled, tmp_path):
    config = CONFIG.model_copy(update={"learning_rate": 1e-9, "patience": 2, "judge_every": 3})
    result = finetune(folder("bert"), labelled, tmp_path / "out", config=config, quiet=True)
    assert "after step 3 of" in result.notes[-2]
    assert "Stopped after step 9." in result.notes[-2]
    assert result.history[-1]["step"] == 9


# ---- going on


def killed_in(child):
    process = os.fork()
    if process == 0:
        try:
            child()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def test_a_killed_run_ends_with_the_same_bits(folder, labelled, tmp_path, monkeypatch):
    start = folder("bert", share=True)
    config = CONFIG.model_copy(update={"steps": 16, "judge_every": 4})

    def go(name):
        return finetune(start, labelled, tmp_path / name, config=config, quiet=True)

    whole = go("whole")
    loss = module._loss
    calls = []

    def deadly(kind, config):
        compute = loss(kind, config)

        def compute_loss(model, batch):
            calls.append(1)
            if len(calls) == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            return compute(model, batch)

        return compute_loss

    with monkeypatch.context() as patch:
        patch.setattr(module, "_loss", deadly)
        killed_in(lambda: go("parts"))
    assert (tmp_path / "parts.part/checkpoints/checkpoint-8").is_dir()
    torch.manual_seed(99)
    resumed = go("parts")
    assert same(*(load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole")))
    assert resumed.history == whole.history
    assert resumed.notes == whole.notes


# ---- heads and labels


def test_a_head_that_is_there_is_kept_unless_a_new_one_is_asked_for(folder, labelled, tmp_path):
    config = CONFIG.model_copy(update={"steps": 1, "learning_rate": 1e-9})
    first = tmp_path / "first"
    finetune(folder("bert"), labelled, first, config=config, quiet=True)
    head = load_file(first / "model.safetensors")["classifier.weight"]
    finetune(first, labelled, tmp_path / "second", config=config, quiet=True)
    kept = load_file(tmp_path / "second/model.safetensors")["classifier.weight"]
    torch.testing.assert_close(kept, head, atol=1e-6, rtol=0)
    text = labelled.read_text()
    for old, new in (("animal", "x"), ("colour", "y"), ("thing", "z")):
        text = text.replace(f",{old}", f",{new}")
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(DataError, match=r"'x' of the data is not one of the model's: animal.*--new-head"):
        finetune(first, tmp_path / "other.csv", tmp_path / "third", config=config, quiet=True)
    other = config.model_copy(update={"seed": 5})
    finetune(first, tmp_path / "other.csv", tmp_path / "third", new_head=True, config=other, quiet=True)
    renewed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "third")
    assert renewed.config.label2id == {"x": 0, "y": 1, "z": 2}
    assert not torch.allclose(renewed.classifier.weight, head, atol=1e-3)
    base = load_file(first / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(
        renewed.bert.embeddings.word_embeddings.weight.detach(), base, atol=1e-6, rtol=0
    )


# ---- bad input


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("text,label\n", "empty"),
        ("text\n" + "a b\n" * 30, "no column for the label"),
        ("text,label\nthe cat,\n", "line 2, column 'label': is empty"),
        ("text,label\n" + "".join(f"cat {i},x\n" for i in range(30)), "every row has the label 'x'"),
    ],
)
def test_data_without_texts_or_labels_are_refused(bert_folder, tmp_path, rows, says):
    (tmp_path / "bad.csv").write_text(rows)
    with pytest.raises(DataError, match=says):
        finetune(bert_folder, tmp_path / "bad.csv", tmp_path / "out", config=CONFIG, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]


def test_a_label_that_is_never_learnt_is_refused(bert_folder, labelled, tmp_path):
    (tmp_path / "test.csv").write_text("text,label\nthe cat sits,unheard\n")
    with pytest.raises(DataError, match="'unheard' is in the test data but not in the training data"):
        finetune(
            bert_folder, labelled, tmp_path / "out", test=tmp_path / "test.csv", config=CONFIG, quiet=True
        )


def test_settings_that_cannot_be_are_refused(bert_folder, labelled, tmp_path, tiny, tokenizer):
    with pytest.raises(OptionError, match="does not do sentence-embedding"):
        finetune(bert_folder, labelled, tmp_path / "out", task="sentence-embedding", quiet=True)
    with pytest.raises(OptionError, match="ema_decay"):
        finetune(bert_folder, labelled, tmp_path / "out", config=FinetuneConfig(ema_decay=0.9), quiet=True)
    with pytest.raises(LayershareError, match=r"unknown key 'patients'\. Did you mean 'patience'"):
        FinetuneConfig.parse({"patients": 3})
    tiny("bert", vocab_size=20).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="The tokenizer has 27 tokens, the model only 20"):
        finetune(tmp_path / "small", labelled, tmp_path / "out", config=CONFIG, quiet=True)


def test_a_checkpoint_that_lacks_layers_is_refused(folder, labelled, tmp_path):
    start = folder("bert")
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"lacks .*layer\.4"):
        finetune(start, labelled, tmp_path / "out", config=CONFIG, quiet=True)
