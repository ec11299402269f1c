"""SIGKILL in the middle of each stage of a recipe, then the same call again: the bits of an undisturbed run."""

import csv
import functools
import json
import os
import random
import shutil
import signal
import traceback
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import Trainer

from conftest import WORDS
from layershare import Result, stages
from layershare.measure import compare
from layershare.recipe import graph, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

STEPS = {"batch_size": 4, "steps": 8, "save_every": 3}
TRAINS = ("pretrain", "finetune", "distill", "adapt")
STAGE_OF = {
    "pretrain": "base",
    "finetune": "teacher",
    "share": "shared",
    "distill": "distilled",
    "adapt": "adapted",
    "prune": "pruned",
    "evaluate": "report",
}
TIMES = {"created", "seconds", "latency", "base_model_name_or_path"}
"""What differs from run to run: when, how long, and where the base of an adapter is."""


@pytest.fixture(scope="module", autouse=True)
def quick_compare():
    with pytest.MonkeyPatch.context() as patch:
        # One thread: a pool of them would not outlive the fork.
        quick = functools.partial(compare, batches=(1,), runs=2, seconds=0.05, memory=False, threads=1)
        patch.setattr("layershare.measure.evaluate.compare", quick)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, bert_folder):
    """Every verb, on words of the tiny tokenizer."""
    home, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    with (home / "data.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for number in range(60):
            mood = ["red", "blue"][number % 2]
            table.writerow([" ".join([mood, *draw.sample(WORDS.split(), 6)]), mood])
    (home / "text.txt").write_text("\n\n".join(" ".join(draw.sample(WORDS.split(), 12)) for _ in range(80)))
    size = {
        "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return {
        "name": "all",
        "data": {"files": [str(home / "data.csv")]},
        "stages": {
            "base": {
                "verb": "pretrain", "model": "bert", "size": size, "tokenizer": str(bert_folder), "block_size": 16,
                "data": {"task": "masked-lm", "files": [str(home / "text.txt")]}, **STEPS,
            },
            "teacher": {"verb": "finetune", "model": "base", "max_length": 16, "judge_every": 4, **STEPS},
            "shared": {"verb": "share", "model": "teacher", "preset": "basis", "budget": 0.6, "calibrate": True},
            "distilled": {
                "verb": "distill", "model": "shared", "teacher": "teacher", "max_length": 16, "dropout": True,
                "ema_decay": 0.9, **STEPS,
            },
            "adapted": {
                "verb": "adapt", "model": "distilled", "adapter": {"method": "houlsby", "size": 4}, "max_length": 16,
                **STEPS,
            },
            "pruned": {"verb": "prune", "model": "distilled", "what": "neurons", "amount": 0.5, "by": "taylor"},
            "report": {"verb": "evaluate", "models": ["teacher", "distilled", "adapted", "pruned"]},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(graph.parse(recipe), out)
    return out


def up_to(recipe, last):
    """The recipe without what comes behind the stage ``last``."""
    names = list(recipe["stages"])
    kept = names[: names.index(last) + 1]
    return graph.parse(recipe | {"stages": {name: recipe["stages"][name] for name in kept}})


def dies(recipe, out, *, step=0, at=""):
    """Run in a child process that kills itself: in this training step, or before this folder gets its final name."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # rather than hang
        try:
            taken, train, rename = [], Trainer.training_step, Path.replace

            def training_step(self, *args, **kwargs):
                taken.append(1)
                if len(taken) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return train(self, *args, **kwargs)

            def replace(self, target):
                if self.name == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return rename(self, target)

            Trainer.training_step, Path.replace = training_step, replace
            run(recipe, out)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


CASES = [
    *((verb, {"step": 6}) for verb in TRAINS),
    *((verb, {"at": "made.part"}) for verb in STAGE_OF),
    *((verb, {"at": "made"}) for verb in ("distill", "prune")),
]


@pytest.mark.parametrize(
    ("verb", "where"), CASES, ids=[f"{verb}-{next(iter(where.values()))}" for verb, where in CASES]
)
def test_a_stage_killed_anywhere_ends_with_the_same_bits(recipe, whole, tmp_path, monkeypatch, verb, where):
    stage, out = STAGE_OF[verb], tmp_path / "out"
    part_of_it = up_to(recipe, stage)
    before = [name for name in part_of_it.stages if name != stage]
    for name in before:
        shutil.copytree(whole / name, out / name)
    kept = {file: file.stat().st_mtime_ns for name in before for file in (out / name).rglob("*")}
    dies(part_of_it, out, **where)
    part = stages.part_of(out / stage)
    assert part.is_dir()
    assert not (out / stage).exists()
    done = max((int(path.name.split("-")[1]) for path in part.rglob("checkpoint-*")), default=0)
    assert not where.get("step") or 0 < done < where["step"]

    steps, train = [], Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda *args, **kw: (steps.append(1), train(*args, **kw))[1]
    )
    report = run(part_of_it, out)
    assert {one.name: one.state for one in report.planned} == dict.fromkeys(before, "done") | {stage: "made"}
    assert len(steps) == (8 - done if verb in TRAINS and where != {"at": "made"} else 0)
    assert kept == {file: file.stat().st_mtime_ns for file in kept}
    assert sorted(path.name for path in out.iterdir()) == sorted(part_of_it.stages)
    assert_equal(out / stage, whole / stage)


@pytest.mark.parametrize("verb", STAGE_OF)
def test_every_verb_writes_a_result_that_is_true_and_tells_no_folder(whole, recipe, verb):
    folder = whole / STAGE_OF[verb]
    result = Result.load(folder)
    stored = sum(value.numel() for file in folder.glob("*.safetensors") for value in load_file(file).values())
    if verb == "evaluate":
        assert [model.label for model in result.models] == recipe["stages"]["report"]["models"]
    else:
        first, made = result.models[:2]
        base = first.parameters_unique if verb == "adapt" else 0
        assert made.parameters_unique == base + stored
        assert made.bytes_on_disk == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if verb in TRAINS:
        assert result.history[-1]["step"] == 8
        assert all(model.metrics[result.metric] >= 0 for model in result.models)
        assert {"judge before", "train", "judge after"} <= set(result.seconds)
        assert any(note.startswith("Settings: ") and '"steps": 8' in note for note in result.notes)
    if verb not in ("share", "prune"):
        assert set(result.data["files"]) <= {"data.csv", "text.txt"}
    assert "/" not in "".join(result.data.get("files", ())) + result.source
    assert str(whole) not in (folder / "result.json").read_text()
    assert result.headline()
    assert result.table()


def assert_equal(ours, theirs):
    """Two folders hold the same files with the same bytes, of results and records all but the times."""
    names = sorted(str(file.relative_to(theirs)) for file in theirs.rglob("*"))
    assert sorted(str(file.relative_to(ours)) for file in ours.rglob("*")) == names
    for name in names:
        mine, other = ours / name, theirs / name
        if name.endswith((".html", ".md")):
            continue  # made from the result
        if name.endswith(".json"):
            assert timeless(mine) == timeless(other), name
        elif mine.is_file():
            assert mine.read_bytes() == other.read_bytes(), name


def timeless(file):
    def without(value):
        if isinstance(value, list):
            return [without(one) for one in value]
        if isinstance(value, dict):
            return {key: without(one) for key, one in value.items() if key not in TIMES}
        return value

    found = without(json.loads(file.read_text(encoding="utf-8")))
    if file.name == stages.RECORD:
        del found["stage"]  # where the models were
    return found
