"""bench: models and exports side by side; figures against independent counts, no timed assertion."""

import json

import pytest

from layershare.cli import main
from layershare.errors import ModelError, OptionError
from layershare.measure import bench as module
from layershare.measure.bench import Bench, Row, bench
from layershare.measure.resident import resident_memory
from layershare.measure.subject import Subject
from layershare.report.bench_page import page, save
from layershare.result import Latency

FAST = dict(runs=2, seconds=0.01, threads=1, batch=2)


def row(label, p50, engine="ONNX Runtime", precision="int8", **more):
    one = Latency(batch=1, tokens=12, runs=9, p50_ms=p50, p95_ms=2 * p50)
    sizes = dict(bytes_on_disk=2_000_000, resident_bytes=3_000_000)
    return Row(label=label, engine=engine, precision=precision, latency=one, **sizes, **more)


def made(*rows):
    return Bench(machine="a machine", threads=1, tokens=12, new=16, rows=rows)


def test_notes_compare_with_the_first_of_the_same_engine_and_precision():
    found = made(
        row("torch", 9, "PyTorch", "float32"), row("dense", 4), row("a", 2), row("b", 3.95), row("c", 5)
    )
    assert found.notes() == [
        "a is faster than dense at batch 1 (2.00 times as fast).",
        "b is no faster than dense at batch 1 (1.01 times as fast).",
        "c is slower than dense at batch 1 (0.80 times as fast).",
    ]
    assert found.speedup("a") == 4.5


def test_the_table_has_the_column_that_was_measured_and_rates_are_per_second():
    slow = Latency(batch=32, tokens=12, runs=5, p50_ms=64, p95_ms=70)
    text = Latency(batch=1, tokens=12, runs=5, p50_ms=160, p95_ms=170)
    plain, full = made(row("x", 2)).table(), made(row("x", 2), row("y", 4, batch=slow, decode=text)).table()
    assert "tokens/s" not in plain
    assert "inputs/s" not in plain
    assert "| y | ONNX Runtime, int8 | 2.0 | 3.0 | 4.00 (8.00) | 0.50 | 500.0 | 100.0 |" in full
    assert len({line.count("|") for line in full.splitlines()}) == 1


def test_a_page_and_figures_are_written(tmp_path):
    found = made(row("<x>", 2), row("y", 4))
    save(found, tmp_path / "b.json")
    assert Bench.model_validate_json((tmp_path / "b.json").read_text()) == found
    assert "<x>" not in page(found)
    assert page(found).count("<svg") == 1
    with pytest.raises(OptionError, match="html"):
        save(found, tmp_path / "b.png")


def test_a_model_folder_is_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "resident_memory", lambda *_, **__: None)
    tiny("llama").save_pretrained(tmp_path / "a")
    found = bench([tmp_path / "a"], new=3, **FAST).rows[0]
    assert found.bytes_on_disk == (tmp_path / "a" / "model.safetensors").stat().st_size
    assert (found.engine, found.precision) == ("PyTorch", "float32")
    assert found.decode is not None
    assert found.batch.batch == 2


def test_the_verb_prints_json_and_refuses_what_is_no_model(bert_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "resident_memory", lambda *_, **__: None)
    assert main(["bench", str(bert_folder), "--batch", "1", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["label"] == str(bert_folder)
    with pytest.raises(ModelError, match="neither"):
        bench([tmp_path], **FAST)
    with pytest.raises(OptionError, match="twice"):
        bench([bert_folder, bert_folder], **FAST)
    with pytest.raises(OptionError, match=r"reads at most \d+ tokens, not 9000"):
        bench([bert_folder], tokens=9000, **FAST)


def test_a_wrong_ending_is_refused_before_anything_is_measured(bert_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "bench", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", str(bert_folder), "--out", str(tmp_path / "b.png")]) == 2
    assert "html" in capsys.readouterr().err


def test_inputs_of_a_nested_config():
    def ids(config):
        return Subject("", "", config, ["input_ids"], frozenset(), print, None).inputs(2, 50)["input_ids"]

    assert ids({"decoder": {"vocab_size": 40}, "encoder": {"vocab_size": 30}}).max() < 30
    assert (ids({"vocab_size": 40}) == ids({"text_config": {"vocab_size": 40}})).all()
    with pytest.raises(ModelError, match="vocab_size"):
        ids({"width": 3})


def test_resident_memory_grows_with_the_weights(tiny, tmp_path):
    for name, width in (("small", 128), ("large", 1024)):
        tiny("bert", hidden_size=width, intermediate_size=4 * width).save_pretrained(tmp_path / name)
    small, large = (resident_memory(tmp_path / name, threads=1) for name in ("small", "large"))
    weights = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert 0.9 * weights < large < 1.3 * weights
    assert small < large / 4
