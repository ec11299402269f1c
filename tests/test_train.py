"""Training: the order of the texts, exact resuming, and orderly ends."""

import os
import runpy
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from layershare.errors import OptionError, TrainingError
from layershare.tasks.encoding import pad
from layershare.train import TrainConfig, length_grouped_order, train

CONFIG = TrainConfig(steps=12, batch_size=4, learning_rate=1e-2, save_every=4, seed=1)


@pytest.fixture
def dataset():
    """30 rows of random tokens, 3 to 12 long: 12 steps of 4 are 1.6 epochs."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 27, (3 + i % 10,), generator=draw).tolist() for i in range(30)]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


@pytest.fixture
def collate(tokenizer):
    return lambda rows: pad(tokenizer, rows)


def to_one(model, batch):
    """A loss with dropout in it, so that the random state matters."""
    states = model(**batch).last_hidden_state
    return {"a": (states.mean(-1) - 1).square().mean(), "b": 0.5 * model.pooler.dense.bias.sum() ** 2}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- the order of the texts


@pytest.mark.parametrize(("count", "batch", "steps"), [(30, 4, 12), (7, 16, 5), (1000, 8, 300), (1, 2, 3)])
def test_rows_take_turns_and_no_batch_is_short(count, batch, steps):
    order = length_grouped_order([i % 13 for i in range(count)], batch, steps, seed=0)
    times = Counter(order)
    assert len(order) == batch * steps
    assert max(times.values()) - min(times[row] for row in range(count)) <= 1


def test_the_order_follows_the_seed_alone():
    lengths = [i % 13 for i in range(100)]
    torch.manual_seed(0)
    first = length_grouped_order(lengths, 8, 20, 5)
    torch.manual_seed(1)
    assert first == length_grouped_order(lengths, 8, 20, 5)
    assert first != length_grouped_order(lengths, 8, 20, 6)


def test_batches_hold_rows_of_like_length_in_no_order_of_length():
    lengths = [(7 * i) % 400 for i in range(400)]
    order = length_grouped_order(lengths, 8, 50, 0)
    grouped = [[lengths[row] for row in order[i : i + 8]] for i in range(0, 400, 8)]
    assert all(max(batch) - min(batch) <= 8 for batch in grouped)
    means = [sum(batch) for batch in grouped]
    assert 10 < sum(a < b for a, b in pairwise(means)) < 40


# ---- training


def test_training_lowers_the_loss_and_tells_its_terms(tiny, dataset, collate, tmp_path):
    model = tiny("bert")
    history = train(model, dataset, collate, to_one, CONFIG, tmp_path, quiet=True)
    assert [entry["step"] for entry in history] == list(range(1, 13))
    assert history[-1]["loss"] < 0.85 * history[0]["loss"]
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["a"] + entry["b"], rel=1e-5)
        assert {"learning_rate", "grad_norm"} <= entry.keys()
    assert not model.training


def test_bfloat16_computes_in_it_and_keeps_the_weights_whole(tiny, dataset, collate, tmp_path):
    model, seen = tiny("bert"), set()
    model.pooler.dense.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    train(model, dataset, collate, to_one, CONFIG.model_copy(update={"precision": "bfloat16"}), tmp_path)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_same_seed_same_bits(tiny, dataset, collate, tmp_path):
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model = tiny("bert")
        config = CONFIG.model_copy(update={"seed": seed})
        history = train(model, dataset, collate, to_one, config, tmp_path / name, quiet=True)
        results.append((weights(model), history))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert not same(results[0][0], results[2][0])


def test_the_use_cache_of_a_config_is_left_as_it_was(tiny, dataset, collate, tmp_path):
    model = tiny("llama")
    before = model.config.use_cache

    def loss(model, batch):
        return {"x": model(**batch).logits.square().mean()}

    train(model, dataset, collate, loss, CONFIG, tmp_path, quiet=True)
    assert model.config.use_cache is before


def test_shared_weights_stay_shared_and_each_checkpoint_holds_them_once(tiny, dataset, collate, tmp_path):
    model = tiny("llama", tie_word_embeddings=True)

    def loss(model, batch):
        return {"x": model(**batch).logits.square().mean()}

    train(model, dataset, collate, loss, CONFIG, tmp_path, quiet=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = load_file(tmp_path / "checkpoints/checkpoint-12/model.safetensors")
    assert sum(value.numel() for value in stored.values()) == sum(p.numel() for p in model.parameters())
    # and a finished run is found again, tied weights and all
    again = tiny("llama", tie_word_embeddings=True)
    train(again, dataset, collate, loss, CONFIG, tmp_path, quiet=True)
    assert same(weights(again), weights(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


# ---- going on after an end


@pytest.mark.parametrize(("at", "ema"), [(3, 0.0), (8, 0.9), (11, 0.0)])
def test_ctrl_c_saves_and_the_resumed_run_ends_with_the_same_bits(tiny, dataset, collate, tmp_path, ema, at):
    config = CONFIG.model_copy(update={"ema_decay": ema})
    whole = tiny("bert")
    history = train(whole, dataset, collate, to_one, config, tmp_path / "whole", quiet=True)
    calls = []

    def interrupted(model, batch):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return to_one(model, batch)

    # A shell starts background jobs with Ctrl-C ignored, and then nothing here would be put to the test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt, match=f"after step {at} of 12.*goes on from"):
        train(tiny("bert"), dataset, collate, interrupted, config, tmp_path / "parts", quiet=True)
    assert len(calls) == at
    resumed = tiny("bert")
    torch.manual_seed(99)  # a new process would be in another random state
    rest = train(resumed, dataset, collate, to_one, config, tmp_path / "parts", quiet=True)
    assert same(weights(resumed), weights(whole))
    assert [(e["step"], e["loss"]) for e in rest] == [(e["step"], e["loss"]) for e in history]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


KILLED = """
import os, signal, sys
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel
from layershare.train import TrainConfig, train

torch.manual_seed(0)
sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
model = BertModel(BertConfig(vocab_size=32, max_position_embeddings=32, **sizes))
ids = [[5 + (i * j) % 20 for j in range(3 + i % 10)] for i in range(30)]
data = Dataset.from_dict({"input_ids": ids})
out, die_at = sys.argv[1], int(sys.argv[2])

def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(padded), "position": torch.tensor([row["position"] for row in rows])}

def loss(model, batch):
    if int(batch["position"][0]) // 4 + 1 == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"x": model(input_ids=batch["input_ids"]).last_hidden_state.square().mean()}

config = TrainConfig(steps=20, batch_size=4, learning_rate=1e-2, save_every=5, ema_decay=0.8)
train(model, data, collate, loss, config, out)
torch.save(model.state_dict(), out + "/final.pt")
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, capfd):
    script = tmp_path / "run.py"
    script.write_text(KILLED)

    def here(out):
        monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / out), "0"])
        runpy.run_path(str(script))
        return torch.load(tmp_path / out / "final.pt", weights_only=True)

    killed = subprocess.run(
        [sys.executable, script, tmp_path / "parts", "13"], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    kept = sorted(path.name for path in (tmp_path / "parts/checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-5"]
    capfd.readouterr()
    resumed = here("parts")
    out, err = capfd.readouterr()
    assert out == ""
    assert all(line.startswith("training: step") for line in err.splitlines()), err
    assert same(resumed, here("whole"))


@pytest.mark.parametrize("torn", ["trainer_state.json", "optimizer.pt", "average.safetensors"])
def test_a_half_written_checkpoint_is_passed_over(tiny, dataset, collate, tmp_path, torn):
    config = CONFIG.model_copy(update={"ema_decay": 0.9})
    whole = tiny("bert")
    train(whole, dataset, collate, to_one, config, tmp_path, quiet=True)
    file = tmp_path / "checkpoints/checkpoint-12" / torn
    if torn.endswith("json"):
        file.write_text(file.read_text()[:100])
    else:
        file.unlink()
    resumed = tiny("bert")
    train(resumed, dataset, collate, to_one, config, tmp_path, quiet=True)
    assert same(weights(resumed), weights(whole))


def test_a_finished_run_is_not_repeated(tiny, dataset, collate, tmp_path):
    first, second = tiny("bert"), tiny("bert")
    history = train(first, dataset, collate, to_one, CONFIG, tmp_path, quiet=True)

    def never(model, batch):
        raise AssertionError

    assert train(second, dataset, collate, never, CONFIG, tmp_path, quiet=True) == history
    assert same(weights(first), weights(second))


def test_starting_anew_forgets_the_checkpoints(tiny, dataset, collate, tmp_path):
    train(tiny("bert"), dataset, collate, to_one, CONFIG, tmp_path, quiet=True)
    config = CONFIG.model_copy(update={"steps": 4})
    history = train(tiny("bert"), dataset, collate, to_one, config, tmp_path, resume=False, quiet=True)
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]
    assert len(history) == 4


@pytest.mark.parametrize("change", ["config", "data", "model", "labels", "teacher"])
def test_checkpoints_of_another_run_are_refused(tiny, dataset, collate, tmp_path, change):
    dataset = dataset.add_column("labels", [0] * len(dataset))
    inputs = lambda rows: {name: v for name, v in collate(rows).items() if name != "labels"}  # noqa: E731
    train(tiny("bert"), dataset, inputs, to_one, CONFIG, tmp_path, quiet=True, made_of={"teacher": "a"})
    config = CONFIG.model_copy(update={"learning_rate": 0.5}) if change == "config" else CONFIG
    rows = dataset.select(range(29)) if change == "data" else dataset
    if change == "labels":
        rows = dataset.remove_columns("labels").add_column("labels", [0] * 29 + [1])
    model = tiny("bert", seed=1 if change == "model" else 0)
    teacher = {"teacher": "b" if change == "teacher" else "a"}
    message = {
        "labels": "the labels differ",
        "teacher": "the teacher differs",
        "config": "learning_rate was 0.01, now 0.5",
        "data": "the inputs differ",
        "model": "the model to train",
    }
    with pytest.raises(TrainingError, match=f"of another run: {message[change]}.*resume=False"):
        train(model, rows, inputs, to_one, config, tmp_path, quiet=True, made_of=teacher)


# ---- things that go wrong


def test_a_loss_that_is_not_a_number_ends_with_advice_and_a_good_checkpoint(tiny, dataset, collate, tmp_path):
    model = tiny("bert")

    steps: list[int] = []

    def broken(model, batch):
        steps.append(1)
        return {
            **to_one(model, batch),
            "c": model.pooler.dense.bias.sum() * (float("nan") if len(steps) > 6 else 0),
        }

    with pytest.raises(TrainingError, match=r"step 7 \(term: c\).*learning_rate \(now 0.01\)"):
        train(model, dataset, collate, broken, CONFIG, tmp_path, quiet=True)
    stored = load_file(tmp_path / "checkpoints/checkpoint-4/model.safetensors")
    assert all(bool(value.isfinite().all()) for value in stored.values())


def test_weights_that_are_not_numbers_are_never_saved(tiny, dataset, collate, tmp_path):
    model = tiny("bert")

    steps: list[int] = []

    def sly(model, batch):
        steps.append(1)
        if len(steps) == 4:
            with torch.no_grad():
                model.encoder.layer[0].output.dense.bias[0] = float("nan")
        return {"x": model.pooler.dense.bias.square().sum() + model.pooler.dense.weight.square().sum()}

    with pytest.raises(TrainingError, match="weights are no longer finite numbers after step 4"):
        train(model, dataset, collate, sly, CONFIG, tmp_path, quiet=True)
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))


def test_nothing_to_train(tiny, dataset, collate, tmp_path):
    with pytest.raises(TrainingError, match="nothing to train on"):
        train(tiny("bert"), dataset.select([]), collate, to_one, CONFIG, tmp_path)
    with pytest.raises(TrainingError, match="trainable"):
        train(tiny("bert").requires_grad_(False), dataset, collate, to_one, CONFIG, tmp_path)


def test_a_misspelt_setting_names_the_nearest():
    with pytest.raises(OptionError, match=r"learning_rat'.*Did you mean 'learning_rate'"):
        TrainConfig.parse({"learning_rat": 1})
    with pytest.raises(OptionError, match="steps"):
        TrainConfig.parse({"steps": 0})


def test_every_setting_has_its_help_beside_it():
    assert all(field.description for field in TrainConfig.model_fields.values())


# ---- the average of the weights


def test_the_average_is_the_one_of_its_formula(tiny, dataset, collate, tmp_path):
    seen = []
    config = CONFIG.model_copy(update={"steps": 5, "ema_decay": 0.5, "save_every": 1})
    model = tiny("bert")
    average = model.pooler.dense.weight.detach().clone()

    def watch(model, batch):
        seen.append(model.pooler.dense.weight.detach().clone())
        return {"x": (model(**batch).pooler_output - 1).square().mean()}

    train(model, dataset, collate, watch, config, tmp_path, quiet=True)
    last = load_file(tmp_path / "checkpoints/checkpoint-5/model.safetensors")["pooler.dense.weight"]
    for step, weight in enumerate([*seen[1:], last], 1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.pooler.dense.weight.detach(), average)
    assert not torch.equal(average, last)


@pytest.mark.filterwarnings("ignore:Cannot (en|dis)able progress bars")
def test_progress_is_a_few_lines_where_there_is_no_terminal(tiny, dataset, collate, tmp_path, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()  # the bars of a user's session; the test suite has none
    train(tiny("bert"), dataset, collate, to_one, CONFIG, tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert 0 < len(lines) <= 11
    assert all(line.startswith("training: step") for line in lines), err
    assert "step 12 of 12" in lines[-1]
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()


def test_only_the_checkpoint_folder_is_written(tiny, dataset, collate, tmp_path):
    train(tiny("bert"), dataset, collate, to_one, CONFIG, tmp_path, quiet=True)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["checkpoints"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "checkpoint-8",
        "checkpoint-12",
        "run.json",
    }
