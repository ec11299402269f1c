"""Measuring: counted FLOPs equal a closed form, turns are fair, bytes are the weights', memory is the child's."""

import gc
import json
import os
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import layershare
from layershare import measure
from layershare.errors import DataError, StoreError
from layershare.measure.compare import typical
from layershare.measure.latency import quantile
from layershare.measure.machine import fixed_threads, machine
from layershare.measure.memory import status_bytes
from layershare.tasks import Data, get_task

LAYERS, HIDDEN, WIDE, HEADS = 3, 16, 32, 2
WORDS = ("cat", "dog", "sun", "moon", "sea", "tree")


def bert(**changes) -> BertModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 16,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": WIDE,
        "max_position_embeddings": 32,
    }
    return BertModel(BertConfig(**{**sizes, **changes})).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    words = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )


def batch_of(texts: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(texts * tokens).reshape(texts, tokens) % 16
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def save(model, folder) -> str:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


class Clock:
    """Seconds that pass only when something is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, done: list[str], label: str, seconds: float):
        def call() -> None:
            done.append(label)
            self.now += seconds

        return call


# compute


@pytest.mark.parametrize(("texts", "tokens"), [(1, 5), (2, 7)])
def test_flops_of_bert_equal_the_closed_form(texts, tokens):
    per_token = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDE  # q, k, v, output; up, down
    attention = 2 * tokens * tokens * HIDDEN  # scores and mixing, over all heads
    pooler = HIDDEN * HIDDEN
    expected = 2 * texts * (LAYERS * (tokens * per_token + attention) + pooler)
    assert measure.flops(bert(), batch_of(texts, tokens)) == expected


def test_counting_flops_leaves_the_mode_alone():
    model = bert().train()
    measure.flops(model, batch_of(1, 3))
    assert model.training


def test_sharing_does_not_change_flops_and_dropping_does():
    model = bert()
    whole = measure.flops(model, batch_of(2, 7))
    shared = layershare.share(model, layershare.make_plan(model, "all", unique=1))
    assert measure.flops(shared, batch_of(2, 7)) == whole
    assert measure.flops(bert(num_hidden_layers=LAYERS - 1), batch_of(2, 7)) < whole


# latency


def test_models_take_turns_and_only_the_timed_run_counts():
    clock = Clock()
    done: list[str] = []
    calls = {"a": clock.work(done, "a", 0.001), "b": clock.work(done, "b", 0.002)}
    found = measure.latency(calls, batch=4, tokens=9, runs=3, warmup=2, settle=1, fewest=1, clock=clock)
    assert "".join(done) == "abab" + "aabb" * 3
    assert found["a"].p50_ms == pytest.approx(1)
    assert found["b"].p95_ms == pytest.approx(2)
    assert (found["a"].batch, found["a"].tokens, found["a"].runs) == (4, 9, 3)


def test_time_runs_out_only_after_the_fewest_runs_and_a_whole_round():
    clock = Clock()
    done: list[str] = []
    calls = {"a": clock.work(done, "a", 1.0), "b": clock.work(done, "b", 1.0)}
    found = measure.latency(calls, batch=1, runs=50, warmup=0, settle=0, seconds=2.0, fewest=5, clock=clock)
    assert {speed.runs for speed in found.values()} == {5}
    found = measure.latency(calls, batch=1, runs=50, warmup=0, settle=0, seconds=14.5, fewest=5, clock=clock)
    assert {speed.runs for speed in found.values()} == {8}


def test_a_slow_spell_of_the_machine_is_charged_to_all():
    clock = Clock()

    def call() -> None:
        clock.now += 0.001 if clock.now < 0.05 else 0.003

    found = measure.latency({"a": call, "b": call}, batch=1, runs=40, warmup=0, settle=0, clock=clock)
    assert found["a"].p50_ms == pytest.approx(found["b"].p50_ms)
    assert found["a"].p95_ms == pytest.approx(found["b"].p95_ms)


def test_the_garbage_collector_is_off_while_timing_and_restored_even_after_a_failure():
    states = []
    measure.latency({"a": lambda: states.append(gc.isenabled())}, batch=1, runs=2, warmup=1)
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure.latency({"a": lambda: 1 / 0}, batch=1)
    assert gc.isenabled()


@pytest.mark.parametrize("q", [0, 0.5, 0.95, 1])
@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_quantiles_are_those_of_numpy(q, size):
    values = np.random.default_rng(size).random(size).tolist()
    assert quantile(values, q) == pytest.approx(np.quantile(values, q))


def test_threads_are_fixed_and_put_back():
    before = torch.get_num_threads()
    with fixed_threads(1) as used:
        assert torch.get_num_threads() == used == 1
    assert torch.get_num_threads() == before
    assert "2 threads" in machine(2)
    assert os.uname().nodename not in machine()


# bytes


def test_bytes_are_those_of_the_weight_file_alone(tmp_path):
    folder = save(bert(), tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"0" * 1000)
    (tmp_path / "training_args.bin").write_bytes(b"0" * 1000)
    assert measure.bytes_on_disk(folder) == (tmp_path / "model.safetensors").stat().st_size


def test_shards_are_those_of_the_index_and_a_missing_one_is_named(tmp_path):
    bert().save_pretrained(tmp_path, max_shard_size="5KB")
    names = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(names) > 1
    (tmp_path / "model-00009-of-00009.safetensors").write_bytes(b"a stale shard")
    assert measure.bytes_on_disk(tmp_path) == sum((tmp_path / name).stat().st_size for name in names)
    gone = min(names)
    (tmp_path / gone).unlink()
    with pytest.raises(StoreError, match=gone):
        measure.bytes_on_disk(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(StoreError, match="No weights"):
        measure.bytes_on_disk(tmp_path)
    with pytest.raises(StoreError, match="No folder"):
        measure.bytes_on_disk(tmp_path / "missing")


# memory


def test_status_is_read_in_bytes():
    assert status_bytes("Name:\tx\nVmHWM:\t  12 kB\nVmRSS:\t   7 kB\n", "VmRSS") == 7 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_holds_the_weights_and_grows_with_them(tmp_path):
    small, large = bert(), bert(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    found: dict[str, Any] = {}
    for name, model in {"small": small, "large": large}.items():
        model.save_pretrained(tmp_path / name)
        found[name] = measure.peak_memory(tmp_path / name, "AutoModel", batch_of(2, 5), threads=1)
    grown = sum(
        4 * (a.numel() - b.numel()) for a, b in zip(large.parameters(), small.parameters(), strict=True)
    )
    assert grown > 30e6
    assert 0.8 * grown < found["large"] - found["small"] < 3.5 * grown


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_failing_child_is_a_warning_not_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.warns(UserWarning, match="not measured: exit status 1"):
        assert measure.peak_memory(tmp_path, "AutoModel", batch_of(1, 2)) is None


def test_where_there_is_no_proc_memory_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["layershare.measure.memory"], "STATUS", tmp_path / "missing")
    assert measure.peak_memory(tmp_path, "AutoModel", batch_of(1, 2)) is None


# all together


def scored() -> Dataset:
    rows = [(f"{a} {b}", f"{b} {a} {a}", float(i)) for i, (a, b) in enumerate(pairwise(WORDS))]
    text, other, score = (list(column) for column in zip(*rows, strict=True))
    return Dataset.from_dict({"text": text, "text_pair": other, "score": score})


def test_compare_measures_every_figure_of_every_folder(tmp_path):
    model = bert()
    shared = layershare.share(model, layershare.make_plan(model, "all", unique=1))
    folders = {"original": save(model, tmp_path / "a"), "shared": save(shared, tmp_path / "b")}
    task, data = get_task("sentence-embedding"), Data(None, None, scored(), columns={}, sha256={})
    told: list[str] = []
    found = measure.compare(
        folders, task, data, batches=(1, 4), runs=2, threads=1, memory=False, progress=told.append
    )
    original, student = found
    counts = layershare.count(shared)
    assert [figures.label for figures in found] == list(folders)
    assert original.metrics == task.evaluate(model, tokenizer(), data.test)
    assert student.metrics == task.evaluate(shared, tokenizer(), data.test)
    assert original.parameters_unique == sum(parameter.numel() for parameter in model.parameters())
    assert (student.parameters_unique, student.layer_parameters_unique) == (
        counts.unique,
        counts.layer_unique,
    )
    assert student.layer_parameters_unique < original.layer_parameters_unique
    weighed = [measure.bytes_on_disk(folder) for folder in folders.values()]
    assert [figures.bytes_on_disk for figures in found] == weighed
    assert weighed[1] < weighed[0]
    assert student.flops_per_text == original.flops_per_text
    assert [(speed.batch, speed.runs) for speed in student.latency] == [(1, 2), (4, 2)]
    assert student.peak_memory_bytes is None
    assert told[0] == "judge original"


def test_without_scores_quality_is_the_agreement_with_the_original(tmp_path):
    unscored = Data(None, scored().remove_columns("score"), None, columns={}, sha256={})
    folders = {"original": save(bert(), tmp_path / "a")}
    [figures] = measure.compare(
        folders, get_task("sentence-embedding"), unscored, batches=(1,), runs=1, threads=1, memory=False
    )
    assert figures.metrics == {"agreement": pytest.approx(1.0)}


def test_compare_refuses_to_judge_on_training_data(tmp_path):
    with pytest.raises(DataError, match="held-out"):
        measure.compare({"a": tmp_path}, get_task("sentence-embedding"), Data(scored(), None, None, {}, {}))


def test_typical_texts_are_nearest_the_median_length():
    lengths = [9, 1, 5, 4, 6]
    assert [lengths[row] for row in typical(lengths, 3)] == [5, 4, 6]
    assert typical([9], 3) == [0, 0, 0]


def test_rows_that_are_not_judged_on_are_told():
    from layershare.measure.brief import Judge

    def notes(count):
        data = Data(None, None, Dataset.from_dict({"text": ["a"] * count}), {}, {})
        return Judge(get_task("sentence-embedding"), None, data, 8).notes

    assert notes(512) == []
    assert notes(1030) == ["Judged on 344 of 1,030 held-out rows, evenly spread; evaluate takes them all."]
