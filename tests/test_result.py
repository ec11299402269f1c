"""Result: what is saved comes back, what is wrong is refused by name, what is not measured is not invented."""

import json
import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from layershare.errors import StoreError
from layershare.result import FORMAT, MISSING, Figures, Latency, Result, percent, write_atomic


def figures(label: str, layers: int, quality: float, **more) -> Figures:
    return Figures(
        label=label,
        metrics={"spearman": quality, "pearson": quality / 2},
        parameters_unique=layers + 1000,
        parameters_effective=2000,
        layer_parameters_unique=layers,
        layer_parameters_effective=1000,
        **more,
    )


def made(**more) -> Result:
    speed = Latency(batch=1, p50_ms=2.0, p95_ms=3.0, runs=9, tokens=14)
    models = [
        figures("original", 1000, 0.8, bytes_on_disk=8_000_000, flops_per_text=10**9, latency=[speed]),
        figures("shared", 502, 0.7984, bytes_on_disk=6_000_000, flops_per_text=10**9),
        figures("drop", 500, 0.4),
    ]
    return Result(**{"task": "sentence-embedding", "metric": "spearman", "models": models, **more})


def test_a_saved_result_equals_the_loaded_one(tmp_path):
    result = made(
        plan={"stacks": ({"name": "layer", "length": 2, "drop": (1,)},)},
        history=[{"step": 1, "loss": 0.5}],
        data={"sizes": {"test": 3}},
        seconds={"heal": 1.5},
        notes=["a | b", "ü"],
        seed=0,
    )
    assert Result.load(result.save(tmp_path / "any.json")) == result
    assert result.save(tmp_path) == tmp_path / "result.json"
    assert Result.load(tmp_path) == result


def test_saving_twice_gives_the_same_bytes(tmp_path):
    first = made().save(tmp_path / "first.json")
    assert Result.load(first).save(tmp_path / "second.json").read_bytes() == first.read_bytes()


def test_a_figure_that_is_not_a_number_stays_one_and_the_file_stays_json(tmp_path):
    result = made(models=[figures("original", 1000, float("nan"))])
    text = result.save(tmp_path).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert str(Result.load(tmp_path).models[0].metrics["spearman"]) == "nan"


@pytest.mark.parametrize(
    ("path", "nearest"),
    [((), "history"), (("models", 0), "metrics"), (("models", 0, "latency", 0), "tokens")],
)
def test_a_misspelt_key_is_refused_and_the_nearest_is_named(tmp_path, path, nearest):
    values = place = json.loads(made().model_dump_json())
    for step in path:
        place = place[step]
    place[nearest + "x"] = place.pop(nearest)
    (tmp_path / "result.json").write_text(json.dumps(values))
    with pytest.raises(StoreError, match=f"{nearest}x.*Did you mean '{nearest}'"):
        Result.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ("{}", "models"), ("[]", "result.json"), ('{"format": 99}', f"reads up to {FORMAT}")],
)
def test_a_broken_file_is_refused_with_a_reason(tmp_path, text, said):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(StoreError, match=said):
        Result.load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"nothing\.json"):
        Result.load(tmp_path / "nothing.json")


def test_a_result_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        made().seed = 3  # type: ignore[misc]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "file", "old")

    def fail(*_):
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, fail)
            with pytest.raises(OSError, match="disk full"):
                write_atomic(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]
    assert write_atomic(path, "new").read_text() == "new"


def test_ratios_are_shares_of_the_first_model():
    rows = {row.label: row for row in made().rows()}
    assert rows["Spearman"].ratios == pytest.approx((1, 0.998, 0.5))
    assert rows["layer parameters, stored"].ratios == pytest.approx((1, 0.502, 0.5))
    assert list(rows["compute per text"].ratios) == [1, 1, None]
    assert next(iter(rows)) == "Spearman", "the headline metric comes first"


def test_what_was_not_measured_is_a_dash_and_what_nobody_measured_is_no_row():
    rows = {row.label: row.values for row in made().rows()}
    assert rows["p50, batch 1 x 14 tokens"] == ("2.00 ms", MISSING, MISSING)
    assert "peak memory" not in rows


def test_a_share_of_nothing_is_not_a_share():
    result = made(models=[figures("original", 0, -0.1), figures("shared", 0, 0.1)])
    assert {row.label: row.ratios[1] for row in result.rows()}["Spearman"] is None
    assert result.headline() == "original: measured, not compared"
    assert percent(None) == MISSING


def test_the_headline_says_size_and_quality():
    assert made().headline() == "50.2 % of the layer parameters, 99.8 % of Spearman"
    assert made().headline(2) == "50.0 % of the layer parameters, 50.0 % of Spearman"
    assert made(higher_is_better=False).headline().endswith("(lower is better)")


def test_the_tables_hold_every_value_and_the_warning():
    result = made()
    for text in (result.table(), result.markdown()):
        assert "Sharing saves bytes, not FLOPs" in text
        for row in result.rows():
            line = next(line for line in text.splitlines() if row.label in line and row.values[0] in line)
            assert all(value in line for value in row.values)
    lines = result.table().splitlines()[2:-1]
    assert len({len(line) for line in lines}) == 1, "columns line up"
    bars = {line.count("|") for line in result.markdown().splitlines() if line.startswith("|")}
    assert bars == {7}


def test_a_bar_in_a_label_does_not_break_the_markdown_table():
    markdown = made(models=[figures("a|b", 1, 0.5)]).markdown()
    assert "a\\|b" in markdown


def test_reading_results_needs_no_torch():
    code = "import sys, layershare.result, layershare.report, layershare.measure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
