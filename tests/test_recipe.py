"""Recipes: what is finished stays, what changed is made anew with all behind it, what is wrong is told beforehand."""

import csv
import json
import random
from pathlib import Path

import pytest
import yaml

from conftest import WORDS
from layershare import stages
from layershare.errors import LayershareError, OptionError, StoreError, TrainingError
from layershare.recipe import graph, load, plan, run, verbs

ROOT = Path(__file__).parent.parent
FAST = {"batch_size": 4, "max_length": 16, "steps": 2}
FEW = {
    "name": "few",
    "stages": {
        "teacher": {"verb": "finetune", "model": "BERT", **FAST},
        "shared": {"verb": "share", "model": "teacher", "preset": "adjacent", "unique": 2},
        "distilled": {"verb": "distill", "model": "shared", "teacher": "teacher", **FAST},
        "pruned": {"verb": "prune", "model": "teacher", "what": "neurons", "amount": 0.5},
    },
}


@pytest.fixture
def few(tmp_path, bert_folder):
    """``few(name={...}, ...)``: the recipe above with stages changed, added or (None) left out, as a file."""
    draw = random.Random(0)
    with (tmp_path / "data.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for number in range(60):
            mood = ["red", "blue"][number % 2]
            table.writerow([" ".join([mood, *draw.sample(WORDS.split(), 6)]), mood])

    def write(**changed):
        values = json.loads(json.dumps(FEW).replace("BERT", str(bert_folder)))
        values["data"] = {"files": [str(tmp_path / "data.csv")]}
        for name, own in changed.items():
            values["stages"][name] = None if own is None else values["stages"].get(name, {}) | own
        values["stages"] = {name: own for name, own in values["stages"].items() if own is not None}
        (tmp_path / "few.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / "few.yaml"

    return write


def states(report):
    return {one.name: one.state for one in report.planned}


def everything_in(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def quick_compare(monkeypatch):
    import functools

    from layershare.measure import compare

    quick = functools.partial(compare, batches=(1,), runs=2, seconds=0.05, memory=False, threads=1)
    monkeypatch.setattr("layershare.measure.evaluate.compare", quick)


def test_the_whole_graph_once_again_and_changed(few, tmp_path, quick_compare):
    out = tmp_path / "out"
    adapted = {"verb": "adapt", "model": "shared", "adapter": {"method": "pfeiffer", "size": 4}, **FAST}
    names = ["teacher", "shared", "distilled", "adapted", "pruned"]
    recipe = load(few(adapted=adapted, report={"verb": "evaluate", "models": names}))
    predicted = plan(recipe, out)
    assert not out.exists()
    assert set(states(predicted).values()) == {"to do"}

    first = run(recipe, out)
    assert set(states(first).values()) == {"made"}
    assert list(out.glob("*.part")) == []
    for before, after in zip(predicted.planned, first.planned, strict=True):
        if before.name not in ("adapted", "pruned", "report"):
            assert (before.parameters, before.steps) == (after.parameters, after.steps), before.name
    figures = {m["label"]: m for m in json.loads((out / "report" / "result.json").read_text())["models"]}
    assert list(figures) == names
    sizes = {one.name: one for one in predicted.planned}
    assert figures["adapted"]["parameters_unique"] == sizes["adapted"].parameters
    assert figures["pruned"]["parameters_unique"] < sizes["pruned"].parameters
    assert (out / "report" / "report.html").is_file()
    assert "adapted is an adapter" in (out / "report" / "result.json").read_text()

    files = everything_in(out)
    assert set(states(run(recipe, out)).values()) == {"done"}
    assert everything_in(out) == files
    assert set(states(plan(recipe, out)).values()) == {"done"}

    changed = load(tmp_path / "few.yaml", ["shared.unique=1", "distilled.steps=1"])
    assert {n for n, s in states(plan(changed, out)).items() if s == "to do"} == {
        "shared", "distilled", "adapted", "report"
    }  # fmt: skip
    assert everything_in(out) == files


def test_a_changed_key_remakes_its_stage_and_those_behind(few, tmp_path):
    out = tmp_path / "out"
    run(load(few(distilled=None)), out)
    files = everything_in(out / "teacher")
    again = run(load(tmp_path / "few.yaml", ["shared.unique=1"]), out)
    assert states(again) == {"teacher": "done", "shared": "made", "pruned": "done"}
    assert everything_in(out / "teacher") == files
    assert "unique" in (out / "shared" / stages.RECORD).read_text()
    with (tmp_path / "data.csv").open("a") as file:
        file.write("a red cat runs,red\n")
    assert set(states(plan(load(tmp_path / "few.yaml"), out)).values()) == {"to do"}


def test_a_plan_that_is_searched_takes_at_most_its_budget(few, tmp_path):
    found = {"preset": "auto", "unique": None, "budget": 0.5, "calibrate": True, "samples": 8}
    data = {"task": "text-classification", "files": [str(tmp_path / "data.csv")]}
    recipe = load(few(distilled=None, pruned=None, shared=found | {"data": data}))
    before, after = plan(recipe, tmp_path / "out").planned[-1], run(recipe, tmp_path / "out").planned[-1]
    assert not before.exact
    assert 0.9 * before.parameters < after.parameters <= before.parameters
    assert '"fit": "answer"' in (tmp_path / "out" / "shared" / "result.json").read_text().replace("\\", "")


def test_a_killed_run_goes_on_in_the_middle_of_a_stage(few, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    few(pruned=None, teacher={"steps": 4, "save_every": 2, "batch_size": 4})
    recipe = load(tmp_path / "few.yaml")
    run(recipe, tmp_path / "whole")
    from transformers import Trainer

    step, taken = Trainer.training_step, []

    def dies(self, *args, **kwargs):
        if len(taken) == 3:
            raise TrainingError("killed")
        taken.append(1)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(TrainingError, match="stage teacher: killed"):
            run(recipe, tmp_path / "out")
    assert list((tmp_path / "out" / "teacher.part").rglob("checkpoint-2"))
    assert not (tmp_path / "out" / "teacher").exists()

    def counts(self, *args, **kwargs):
        taken.append(1)
        return step(self, *args, **kwargs)

    taken.clear()
    monkeypatch.setattr(Trainer, "training_step", counts)
    assert set(states(run(recipe, tmp_path / "out")).values()) == {"made"}
    assert len(taken) == 2 + 2  # the rest of the teacher, and the student
    for name in ("teacher", "distilled"):
        ours, theirs = (load_file(tmp_path / top / name / "model.safetensors") for top in ("out", "whole"))
        assert all((ours[key] == theirs[key]).all() for key in theirs)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"teacher": {"stepps": 3}}, r"stage teacher: unknown key 'stepps'.*'steps'"),
        ({"distilled": {"weights": {"hiden": 1}}}, r"'weights.hiden'.*'hidden'"),
        ({"distilled": {"temperature": 0}}, r"stage distilled: temperature"),
        ({"shared": {"verb": "shar"}}, r"no verb 'shar'.*'share'"),
        ({"distilled": {"teacher": "techer"}}, r"stage distilled.*'techer'.*'teacher'"),
        ({"teacher": {"model": "distilled"}}, r"teacher -> distilled -> .*teacher"),
        ({"distilled": {"seed": 3}}, r"seed 3.*test file"),
        ({"report": {"verb": "evaluate", "models": []}}, "models"),
        (
            {
                "small": {"verb": "adapt", "model": "shared"},
                "x": {"verb": "share", "model": "small", "unique": 1},
            },
            "small makes an adapter",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(few, changed, said):
    with pytest.raises(OptionError, match=said):
        load(few(**changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shared": {"unique": 9}}, "stage shared: .*unique"),
        ({"pruned": {"by": "taylor", "data": {"files": ["gone.csv"]}}}, "stage pruned: gone.csv"),
        (
            {"distilled": {"data": {"files": ["data.csv"], "columns": {"text": "words"}}}},
            "stage distilled: .*'words'",
        ),
    ],
)
def test_what_a_later_stage_cannot_do_is_told_before_the_first_is_made(
    few, tmp_path, monkeypatch, changed, said
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LayershareError, match=said):
        run(load(few(**changed)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("techer.steps=1", "'teacher'"),
        ("teacher.stepz=1", "'steps'"),
        ("teacher.steps", "STAGE.KEY=VALUE"),
        ("sed=1", "'seed'"),
    ],
)
def test_a_misspelt_setting_names_the_nearest(few, setting, said):
    with pytest.raises(OptionError, match=said):
        load(few(), [setting])


def test_settings_reach_their_stage(few):
    recipe = load(few(), ["seed=5", "distilled.weights.hidden=0.5", "distilled.steps=7"])
    stage = recipe.stages["distilled"]
    assert (stage.seed, stage.weights.hidden, stage.steps) == (5, 0.5, 7)


def test_stages_may_be_written_in_any_order(few, tmp_path):
    values = yaml.safe_load(few().read_text())
    values["stages"] = dict(reversed(values["stages"].items()))
    order = list(graph.parse(values).stages)
    assert order.index("teacher") < order.index("shared") < order.index("distilled")


def test_a_stage_does_not_take_the_place_of_something_else(few, tmp_path):
    (tmp_path / "out" / "teacher").mkdir(parents=True)
    (tmp_path / "out" / "teacher" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="not a folder of a run"):
        run(load(few()), tmp_path / "out")
    assert (tmp_path / "out" / "teacher" / "letter.txt").read_text() == "dear"


def test_a_stage_is_whole_wherever_it_is_killed(tmp_path):
    out, calls = tmp_path / "stage", []

    def fill(folder):
        calls.append(1)
        folder.mkdir()
        (folder / "weights").write_text("w")
        return {"seconds": 1}

    assert stages.make(out, {"n": 1}, fill)
    assert not stages.make(out, {"n": 1}, fill)
    with pytest.raises(StoreError, match="another n"):
        stages.make(out, {"n": 2}, fill)
    with pytest.raises(StoreError, match="another n"):  # also where only the old one says something of it
        stages.make(out, {}, fill)
    out.replace(tmp_path / "moved")  # killed between the two renames: the new one is whole beside the gap
    part = stages.part_of(out)
    part.mkdir()
    (part / "inputs.json").write_text('{"n": 2}')
    fill(part / "made")
    assert stages.make(out, {"n": 2}, fill, replace=True)
    assert (len(calls), stages.record(out)["inputs"]) == (2, {"n": 2})


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_committed_recipes_are_right(file):
    recipe = load(file)
    assert recipe.stages
    assert {type(stage) for stage in recipe.stages.values()} <= set(verbs.VERBS.values())


TINY_GPT2 = '{"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}'
SHORT = {
    "language_model": [
        *(f"{name}.{setting}" for name in ("base", "from-the-start") for setting in (
            f"size={TINY_GPT2}", "vocabulary=300", "block_size=16", "batch_size=4", "steps=4"
        )),
        "distilled.steps=3", "distilled.max_length=16",
    ],
    "classification": [
        "teacher.steps=4", "teacher.max_length=16", "gated.unique=3", "basis.budget=0.6",
        *(f"{name}-distilled.steps=2" for name in ("basis", "gated", "dropped")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_the_committed_recipes_run_from_end_to_end(few, tmp_path, bert_folder, quick_compare, name):
    """The files as they are, on a tiny model and little text."""
    few()  # writes the data
    task = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())["data"]["task"]
    data = json.dumps({"task": task, "files": [str(tmp_path / "data.csv")]})
    own = [f"teacher.model={bert_folder}"] if name == "classification" else []
    recipe = load(ROOT / "recipes" / f"{name}.yaml", [f"data={data}", *own, *SHORT[name]])
    report = run(recipe, tmp_path / "out")
    assert set(states(report).values()) == {"made"}
    models = json.loads((tmp_path / "out" / "report" / "result.json").read_text())["models"]
    assert tuple(model["label"] for model in models) == recipe.stages["report"].models
    for model in models:
        stored = next(one.parameters for one in report.planned if one.name == model["label"])
        assert model["parameters_unique"] == stored
    assert set(states(run(recipe, tmp_path / "out")).values()) == {"done"}


def test_every_verb_has_a_stage_whose_keys_are_its_own():
    for name, kind in verbs.VERBS.items():
        assert kind.model_config["extra"] == "forbid", name
        assert set(kind.REFERENCES) <= set(kind.model_fields), name
