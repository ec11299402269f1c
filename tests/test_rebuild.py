"""What a saved model says of its making is enough to make it again, bit for bit."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModel

from layershare.cli import main
from layershare.compress import compress
from layershare.result import Result
from layershare.sharing.folder import share_folder
from layershare.stages import fingerprint


def origin_of(folder):
    """What config.json says of how the model was made, and its plan."""
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found["made"], found["plan"]


def find(wanted, places):
    """The files of these hashes, among those that somebody who rebuilds has at hand."""
    hashes = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in places}
    return [hashes[one] for one in wanted.values()]


def same_weights(one, other):
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.fixture
def places(pairs_file, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("text\na cat\n")
    return [other, pairs_file]


@pytest.mark.parametrize("fit", ["inputs", "answer", "sequential"])
def test_a_shared_model(bert_folder, pairs_file, places, tmp_path, fit):
    first, second = tmp_path / "first", tmp_path / "second"
    share_folder(
        bert_folder, first, preset="cycle", unique=2, rank=2, merge="regmean", calibration=[pairs_file],
        task="sentence-embedding", fit=fit, reading={"split": (0.8, 0.2, 0.0), "seed": 3},
    )  # fmt: skip
    made, plan = origin_of(first)
    assert made["source_sha256"] == fingerprint(bert_folder)
    assert made["fit"] == fit
    files, told = find(made["data_sha256"], places), Result.load(first)
    share_folder(
        bert_folder, second, plan=first / "plan.toml", calibration=files, task=made["task"], fit=made["fit"],
        reading={"split": tuple(made["split"]), "seed": made["seed"]},
    )  # fmt: skip
    assert same_weights(first, second)
    assert origin_of(second) == (made, plan)
    assert (told.seed, told.task) == (made["seed"], made["task"])
    assert list(told.data["files"].values()) == list(made["data_sha256"].values())


def test_a_compressed_and_healed_model(bert_folder, pairs_file, places, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    settings = dict(steps=3, budget=0.6, seed=2, progress=lambda _: None)
    compress(bert_folder, task="sentence-embedding", data=[pairs_file], out=first, **settings)
    made, _ = origin_of(first)
    assert made["source_sha256"] == fingerprint(bert_folder)
    compress(
        bert_folder, task=made["task"], data=find(made["data_sha256"], places), out=second, seed=made["seed"],
        plan=first / "plan.toml", steps=made["heal"]["steps"], progress=lambda _: None,
    )  # fmt: skip
    assert same_weights(first, second)
    told = Result.load(first)
    assert (told.seed, list(told.data["files"].values())) == (
        made["seed"],
        list(made["data_sha256"].values()),
    )


def test_it_outlives_loading_and_saving(bert_folder, pairs_file, tmp_path):
    first = tmp_path / "first"
    share_folder(
        bert_folder, first, preset="basis", rank=3, calibration=[pairs_file], task="sentence-embedding"
    )  # fmt: skip
    AutoModel.from_pretrained(first).save_pretrained(tmp_path / "again")
    assert origin_of(tmp_path / "again") == origin_of(first)
    assert str(tmp_path) not in (first / "config.json").read_text()


def test_a_searched_plan_says_what_it_was_searched_on(bert_folder, pairs_file, tmp_path):
    pytest.importorskip("optuna")
    few = tmp_path / "few.csv"
    few.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:25]))
    out = tmp_path / "found"
    words = ["plan", bert_folder, "--data", few, "--budget", 0.6, "--trials", 1, "--seed", 4, "-o", out]
    assert main([str(word) for word in words]) == 0
    told, record = Result.load(out), json.loads((out / "search.json").read_text())["inputs"]
    digest = hashlib.sha256(few.read_bytes()).hexdigest()
    assert told.data["files"] == {"few.csv": digest}
    assert (told.seed, told.task) == (4, "sentence-embedding")
    assert record["data"] == [digest]
    assert record["model"] == fingerprint(Path(bert_folder))
    assert (record["budget"], record["seed"]) == (0.6, 4)
