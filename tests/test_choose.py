"""Distillation keeps the best weights on texts that it does not learn, those that it began with among them."""

import copy
from dataclasses import replace

import pytest
import torch

from layershare.heal.config import LossWeights
from layershare.heal.distill import distill
from layershare.heal.folder import heal_folder
from layershare.result import Result
from test_distill import CLASSIFICATION, EMBEDDING, QUICK, classifier, data, labelled_file  # noqa: F401

# ruff: noqa: F811
LEARN = QUICK.model_copy(
    update={"weights": LossWeights(hidden=0, logits=0, labels=1), "train_embeddings": True, "steps": 120}
)


@pytest.fixture(scope="module")
def labelled(labelled_file):
    return CLASSIFICATION.read(labelled_file, split=(0.6, 0.3, 0.1))


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def accuracy(model, tokenizer, data):
    return CLASSIFICATION.evaluate(model, tokenizer, data.validation, max_length=16)["accuracy"]


def judged(history):
    return {
        entry["step"]: entry["validation_accuracy"] for entry in history if "validation_accuracy" in entry
    }


@pytest.fixture
def run(tokenizer, labelled, tmp_path):
    """``run(student, steps=8)``: distil it from an ignorant teacher; returns the history."""

    def go(student, folder="run", data=labelled, **settings):
        config = QUICK.model_copy(update={"weights": LossWeights(hidden=0), "learning_rate": 0.3} | settings)
        return distill(
            student,
            classifier(seed=3),
            tokenizer,
            CLASSIFICATION,
            data,
            config,
            tmp_path / folder,
            quiet=True,
        )

    return go


@pytest.fixture(scope="module")
def taught(tokenizer, labelled, tmp_path_factory):
    """A classifier that knows the labels of its data."""
    student, folder = classifier(layers=2, seed=1), tmp_path_factory.mktemp("taught")
    config = LEARN.model_copy(update={"keep": "last"})
    distill(student, classifier(), tokenizer, CLASSIFICATION, labelled, config, folder, quiet=True)
    assert accuracy(student, tokenizer, labelled) > 0.8
    return student


def test_healing_that_makes_it_worse_is_undone(run, taught, tokenizer, labelled):
    before, start = weights_of(taught), accuracy(taught, tokenizer, labelled)
    last, best = copy.deepcopy(taught), copy.deepcopy(taught)
    assert "kept_step" not in run(last, "last", steps=8, keep="last")[-1]
    assert accuracy(last, tokenizer, labelled) < start
    history = run(best, "best", steps=8, judge_every=4)
    assert list(judged(history)) == [4, 8]
    assert max(judged(history).values()) < start
    assert history[-1]["kept_step"] == 0
    assert same(best, before)


def test_the_best_in_between_is_kept(run, tokenizer, labelled):
    student, last = classifier(layers=2, seed=1), classifier(layers=2, seed=1)
    start, settings = accuracy(student, tokenizer, labelled), LEARN.model_dump() | {"weights": LEARN.weights}
    history = run(student, "best", **(settings | {"judge_every": 10}))
    run(last, "last", **(settings | {"keep": "last"}))
    best = max(judged(history).values())
    assert start < best == accuracy(student, tokenizer, labelled)
    first = next(step for step, figure in judged(history).items() if figure == best)
    assert history[-1]["kept_step"] == first < 120
    assert not same(student, weights_of(last))


def test_the_end_is_as_good_as_the_beginning_where_both_are_equal(run, taught):
    student = copy.deepcopy(taught)
    history = run(student, steps=2, learning_rate=1e-6)
    assert history[-1]["kept_step"] == 2
    assert not same(student, weights_of(taught))


@pytest.mark.parametrize("rows", [0, 31])
def test_without_texts_to_choose_on_the_last_are_kept(run, taught, labelled, rows):
    student, some = copy.deepcopy(taught), labelled.validation.select(range(rows)) if rows else None
    assert "kept_step" not in run(student, data=replace(labelled, validation=some), steps=8)[-1]
    assert not same(student, weights_of(taught))


def test_an_average_is_judged_too(run, taught):
    student, before = copy.deepcopy(taught), weights_of(taught)
    assert run(student, steps=8, ema_decay=0.9)[-1]["kept_step"] == 0
    assert same(student, before)


def test_scores_that_are_all_the_same_are_no_hindrance(tiny, tokenizer, data, tmp_path):
    constant = data.train.map(lambda row: row | {"score": 1.0})
    history = distill(
        tiny("bert", seed=1), tiny("bert"), tokenizer, EMBEDDING, replace(data, validation=constant), QUICK, tmp_path,
        quiet=True,
    )  # fmt: skip
    assert "kept_step" not in history[-1]


def test_without_scores_the_teacher_says_what_is_best(tiny, tokenizer, data, tmp_path):
    bare = replace(data, validation=data.train.remove_columns("score"))
    history = distill(
        tiny("bert", seed=1), tiny("bert"), tokenizer, EMBEDDING, bare, QUICK, tmp_path, quiet=True
    )
    assert history[-1]["validation_agreement"] > 0
    assert history[-1]["kept_step"] == QUICK.steps


def test_a_run_that_was_stopped_chooses_as_a_whole_one(run, taught, monkeypatch):
    import layershare.heal.distill as module

    settings = {"steps": 9, "judge_every": 3, "learning_rate": 0.02}
    whole, parts = copy.deepcopy(taught), copy.deepcopy(taught)
    history, real, calls = run(whole, "whole", **settings), module.loss_terms, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyError
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "loss_terms", failing)
        with pytest.raises(KeyError):
            run(copy.deepcopy(taught), "parts", **settings)
    assert run(parts, "parts", **settings) == history
    assert same(parts, weights_of(whole))


def test_the_result_says_what_was_kept(taught, tokenizer, labelled_file, tmp_path):
    for name, model in (("student", taught), ("teacher", classifier(seed=3))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    config = QUICK.model_copy(update={"weights": LossWeights(hidden=0), "learning_rate": 0.3, "steps": 8})
    lines = labelled_file.read_text().splitlines(keepends=True)
    files = {"train": lines[::2], "validation": lines[1::2]}
    for name, some in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    result = heal_folder(
        tmp_path / "student", tmp_path / "teacher", CLASSIFICATION, [tmp_path / "train.jsonl"], tmp_path / "out",
        validation=[tmp_path / "validation.jsonl"], config=config,
    )  # fmt: skip
    assert any("does not help on the validation split" in note for note in result.notes)
    assert Result.load(tmp_path / "out").models[1].metrics == result.models[2].metrics
