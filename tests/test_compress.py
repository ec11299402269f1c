"""compress from end to end: share, heal, measure, report; again, killed, with a baseline, and refused."""

import functools
import json
import os
import shutil

import pytest
from safetensors.torch import load_file
from transformers import AutoModel, Trainer

import layershare
from layershare import Result, stages
from layershare.compress import compress
from layershare.errors import DataError, LayershareError, OptionError, PlanError, StoreError, TrainingError
from layershare.measure import compare


@pytest.fixture(autouse=True, scope="module")
def quick_compare():
    quick = functools.partial(compare, batches=(1,), runs=2, seconds=0.05, memory=False, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layershare.compress.compare", quick)
        yield


def caller(bert_folder, pairs_file, out):
    def call(**changed):
        call.said.clear()
        options = {
            "task": "sentence-embedding", "data": [pairs_file], "out": out, "steps": 3, "budget": 0.6,
        } | changed  # fmt: skip
        return compress(options.pop("model", bert_folder), progress=call.said.append, **options)

    call.said = []
    return call


@pytest.fixture
def call(bert_folder, pairs_file, tmp_path):
    """``call(budget=0.6)``: compress the tiny model into ``out`` in a few steps; what it says is in ``call.said``."""
    return caller(bert_folder, pairs_file, tmp_path / "out")


@pytest.fixture(scope="module")
def made(bert_folder, pairs_file, tmp_path_factory):
    """A finished run: its folder and its result. Do not write into it."""
    out = tmp_path_factory.mktemp("made") / "out"
    return out, caller(bert_folder, pairs_file, out)()


@pytest.fixture
def done(made, tmp_path):
    """The finished run, again in ``out``, and its result."""
    shutil.copytree(made[0], tmp_path / "out")
    return made[1]


def everything_in(folder):
    """Every file with its bytes and its age."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def weights(folder):
    return {name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()}


def test_a_fresh_run_makes_a_model_that_loads_with_a_result_that_is_true(made, bert_folder):
    out, result = made
    model = AutoModel.from_pretrained(out)
    original, shared = result.models
    counts = layershare.count(model)
    assert (shared.layer_parameters_unique, shared.parameters_unique) == (counts.layer_unique, counts.unique)
    assert 0 < shared.layer_parameters_unique / original.layer_parameters_unique <= 0.6
    assert shared.bytes_on_disk == (out / "model.safetensors").stat().st_size
    assert (shared.label, result.source, result.metric) == ("shared", bert_folder.name, "spearman")
    assert [entry["step"] for entry in result.history] == [1, 2, 3]
    assert set(result.seconds) == {"plan", "share", "heal", "measure"}
    assert Result.load(out) == result
    assert result.plan == layershare.plan_of(model).model_dump(mode="json")
    assert {"report.html", "README.md", "plan.toml", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    assert not {"checkpoints", "inputs.json"} & {path.name for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_second_run_makes_nothing_and_measures_nothing(call, done, tmp_path, monkeypatch):
    before = everything_in(tmp_path / "out")

    def never(*_, **__):
        raise AssertionError("done already")

    monkeypatch.setattr("layershare.compress.compare", never)
    monkeypatch.setattr("layershare.compress.distill", never)
    assert call() == done
    assert "already made" in call.said[0]
    after = everything_in(tmp_path / "out")
    pages = {name for name in before if name.name in ("report.html", "README.md")}  # written anew, the same
    assert {name: after[name][0] for name in pages} == {name: before[name][0] for name in pages}
    assert {n: v for n, v in after.items() if n not in pages} == {
        n: v for n, v in before.items() if n not in pages
    }


def test_a_lost_report_comes_back_without_training(call, done, tmp_path, monkeypatch):
    (tmp_path / "out" / "report.html").unlink()
    call()
    assert (tmp_path / "out" / "report.html").is_file()
    (tmp_path / "out" / "result.json").unlink()
    monkeypatch.setattr("layershare.compress.distill", lambda *_, **__: 1 / 0)
    again = call()
    assert again.models[1].label == "shared"
    assert [entry["step"] for entry in again.history] == [1, 2, 3]


@pytest.mark.parametrize("at", [1, 4])
def test_a_run_that_dies_goes_on_to_the_same_weights(call, tmp_path, monkeypatch, at):
    # Checkpoints are at least 50 steps apart, save_every brings them nearer; what is killed is told by test_kill.py.
    from layershare.heal.config import DistillConfig

    parse = DistillConfig.parse
    monkeypatch.setattr(DistillConfig, "parse", lambda values: parse(values | {"save_every": 2}))
    call(out=tmp_path / "whole", steps=6)
    step, taken = Trainer.training_step, []

    def dies(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == at:
            raise TrainingError("killed")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(TrainingError, match="killed"):
            call(steps=6)
    assert not (tmp_path / "out").exists()
    taken.clear()
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, *args, **kw: (taken.append(1), step(self, *args, **kw))[1]
    )
    call(steps=6)
    assert len(taken) == {1: 6, 4: 4}[at]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_baseline_of_equal_bytes_is_made_beside_it(call, done, tmp_path):
    before = everything_in(tmp_path / "out")
    both = call(baseline="drop")
    assert "already made" in call.said[0]
    assert [model.label for model in both.models] == ["original", "shared", "layer drop"]
    original, _, dropped = both.models
    assert dropped.layer_parameters_unique <= 0.6 * original.layer_parameters_unique
    assert both.models[1].metrics == done.models[1].metrics
    model = AutoModel.from_pretrained(tmp_path / "out" / "baseline-drop")
    assert layershare.count(model).layer_unique == dropped.layer_parameters_unique
    assert stages.record(tmp_path / "out" / "baseline-drop")["inputs"]["plan"] == {
        "scheme": "drop", "budget": 0.6
    }  # fmt: skip
    kept = everything_in(tmp_path / "out")
    assert all(
        kept[name] == before[name] for name in before if name.name in ("model.safetensors", "plan.toml")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layershare.compress.compare", lambda *_, **__: 1 / 0)
        assert call(baseline="drop") == both


def test_it_keeps_as_many_layers_as_it_is_told(call, tmp_path):
    result = call(unique=2, budget=0.4)
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    assert 0.3 < result.models[1].layer_parameters_unique / result.models[0].layer_parameters_unique <= 0.4


def test_a_baseline_beside_a_plan_file_is_of_its_size(call, bert_folder, tmp_path):
    stacks = layershare.find_stacks(AutoModel.from_pretrained(bert_folder))
    plan = layershare.make_plan(stacks, "adjacent", unique=2)
    plan.save(tmp_path / "plan.toml")
    result = call(budget=None, plan=tmp_path / "plan.toml", baseline="drop")
    assert layershare.plan_of(AutoModel.from_pretrained(tmp_path / "out")) == plan
    assert AutoModel.from_pretrained(tmp_path / "out" / "baseline-drop").config.num_hidden_layers == 2
    original, shared, dropped = (model.layer_parameters_unique for model in result.models)
    assert dropped == original / 2 <= shared < 0.6 * original


def test_a_result_tells_no_folder_of_the_user(call, tmp_path, pairs_file, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/opt/bin/layershare", "compress", f"--data={pairs_file}", "-o", str(tmp_path / "out")]
    )
    result = call()
    assert result.data["files"] == {pairs_file.name: result.data["files"][pairs_file.name]}
    assert result.command == f"layershare compress --data={pairs_file.name} -o out"
    told = [(tmp_path / "out" / name).read_text() for name in ("result.json", "README.md", "report.html")]
    assert not [text for text in told if str(pairs_file.parent) in text or str(tmp_path) in text]


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"budget": 1.5}, OptionError, "1.5"),
        ({"plan": "plan.toml"}, OptionError, "--budget does not go with --plan"),
        ({"budget": 0.001, "scheme": "adjacent"}, PlanError, "0.1"),
        ({"scheme": "adjacnt"}, LayershareError, "'adjacent'"),
        ({"task": "sentence-embeding"}, OptionError, "'sentence-embedding'"),
        ({"baseline": "dorp"}, OptionError, "drop"),
        ({"data": ["nowhere.csv"]}, DataError, "nowhere.csv"),
        ({"steps": 0}, OptionError, "steps"),
        ({"seed": 5}, StoreError, "another"),
        ({"budget": 0.7}, StoreError, "another plan"),
        ({"unique": 9}, PlanError, "unique = 9 does not suit 4 layers"),
        ({"unique": 2, "scheme": "drop"}, OptionError, "--scheme auto"),
    ],
)
@pytest.mark.usefixtures("done")
def test_what_is_wrong_leaves_the_folder_as_it_was(call, tmp_path, changed, error, said):
    before = everything_in(tmp_path)
    for options in (changed, changed | {"overwrite": True}):
        if error is StoreError and "overwrite" in options:
            continue
        with pytest.raises(error, match=said):
            call(**options)
        assert everything_in(tmp_path) == before


def test_a_folder_of_something_else_is_refused_even_with_overwrite(call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="not a folder of a run"):
            call(overwrite=overwrite)
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"


@pytest.mark.usefixtures("done")
def test_overwrite_begins_anew_with_other_settings(call, tmp_path):
    result = call(budget=0.8, overwrite=True)
    assert result.models[1].layer_parameters_unique > 0.6 * result.models[0].layer_parameters_unique
    assert json.loads((tmp_path / "out" / stages.RECORD).read_text())["inputs"]["plan"]["budget"] == 0.8
    assert os.listdir(tmp_path) == ["out"]
