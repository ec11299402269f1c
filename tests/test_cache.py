"""The teacher's outputs on disk: equal to computed ones, found again by other runs, never trusted when wrong."""

import os
from typing import Any

import numpy as np
import pytest
import torch

from layershare.errors import OptionError, StoreError
from layershare.heal.cache import TeacherOutputs, model_hash
from layershare.heal.collator import Collator
from layershare.heal.config import DistillConfig, LossWeights
from layershare.heal.distill import distill
from layershare.heal.teacher import Wanted, live
from layershare.tasks import TASKS

EMBEDDING: Any = TASKS["sentence-embedding"]
WANTED = Wanted(hidden=(0, 3), relations=2)
QUICK = DistillConfig(steps=4, batch_size=8, learning_rate=5e-3, max_length=16)


@pytest.fixture(scope="module")
def data(pairs_file):
    return EMBEDDING.read(pairs_file, split=(0.2, 0.4, 0.4))


@pytest.fixture
def encoded(tokenizer, data):
    return EMBEDDING.encode(tokenizer, data.train, 16)


@pytest.fixture
def make(tiny, tokenizer, encoded):
    """Outputs of a tiny teacher, and how often it was run on a batch of more than the sample."""

    def make(wanted=WANTED, teacher=None, **options):
        return TeacherOutputs(teacher or tiny("bert"), EMBEDDING, tokenizer, encoded, wanted, **options)

    return make


@pytest.fixture
def filled(monkeypatch):
    """One entry for each time that a teacher was run over all texts."""
    times: list[int] = []
    real = TeacherOutputs._fill

    def counting(self, arrays):
        times.append(len(arrays))
        return real(self, arrays)

    monkeypatch.setattr(TeacherOutputs, "_fill", counting)
    return times


def batch_of(tokenizer, encoded, rows=(3, 0, 17, 5)):
    batch = Collator(tokenizer)([{**encoded[row], "row": row, "position": i} for i, row in enumerate(rows)])
    return {name: value for name, value in batch.items() if name != "row"}, batch["row"]


def same(ours, theirs, mask, atol=1e-6):
    torch.testing.assert_close(ours.embedding, theirs.embedding, atol=atol, rtol=0)
    for name in ("hidden", "relations"):
        ones, others = getattr(ours, name), getattr(theirs, name)
        assert list(ones) == list(others)
        for key in others:
            torch.testing.assert_close(ones[key][mask], others[key][mask], atol=atol, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_outputs_from_disk_equal_live_ones(
    make, tiny, tokenizer, encoded, tmp_path, filled, side, monkeypatch
):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    inputs, rows = batch_of(tokenizer, encoded)
    theirs = live(tiny("bert"), EMBEDDING, WANTED)(inputs, rows)
    told: list[str] = []
    for _ in range(2):
        ours = make(batch_size=7).on_disk(tmp_path, told.append)(inputs, rows)
        same(ours, theirs, inputs["attention_mask"].bool())
    assert len(filled) == 1
    assert "writing" in told[0]
    assert "MB" in told[0]
    assert "read from" in told[1]
    assert not list(tmp_path.rglob("*.part"))


def test_half_precision_is_half_the_size_and_near(make, tiny, tokenizer, encoded, tmp_path):
    inputs, rows = batch_of(tokenizer, encoded)
    half, whole = make(half=True), make()
    assert 2 * half.size == whole.size
    for ask in (half.on_disk(tmp_path), make(half=True).on_disk(tmp_path), half.in_memory()):
        same(
            ask(inputs, rows),
            live(tiny("bert"), EMBEDDING, WANTED)(inputs, rows),
            inputs["attention_mask"].bool(),
            2e-3,
        )


def test_other_layers_are_added_to_what_is_there(make, tmp_path, filled):
    make(Wanted(hidden=(1,))).on_disk(tmp_path)
    make(Wanted(hidden=(1, 2))).on_disk(tmp_path)
    make(Wanted(hidden=(2,))).on_disk(tmp_path)
    assert filled == [2, 1]  # the embedding and a layer, then the other layer alone
    (home,) = tmp_path.iterdir()
    assert sorted(file.name for file in home.iterdir()) == ["embedding.npy", "hidden-1.npy", "hidden-2.npy"]


def test_another_teacher_or_text_or_length_finds_nothing(
    make, tiny, tokenizer, encoded, tmp_path, data, filled
):
    make().on_disk(tmp_path)
    make(teacher=tiny("bert", seed=1)).on_disk(tmp_path)
    make(rows=range(10)).on_disk(tmp_path)
    shorter = EMBEDDING.encode(tokenizer, data.train, 8)
    TeacherOutputs(tiny("bert"), EMBEDDING, tokenizer, shorter, WANTED).on_disk(tmp_path)
    assert len(filled) == len(list(tmp_path.iterdir())) == 4


def test_the_hash_of_a_model_sees_weights_and_config_alone(tiny):
    one, other = tiny("bert"), tiny("bert")
    other.config._name_or_path = "elsewhere"
    assert model_hash(one) == model_hash(other)
    other.config.layer_norm_eps = 0.1
    assert model_hash(one) != model_hash(other)
    with torch.no_grad():
        one.encoder.layer[3].output.dense.bias[0] += 1e-6
    assert model_hash(one) != model_hash(tiny("bert"))


@pytest.mark.parametrize("harm", ["cut off", "empty", "other numbers", "other shape", "gone"])
def test_a_file_that_cannot_be_trusted_is_made_anew(make, tiny, tokenizer, encoded, tmp_path, filled, harm):
    make().on_disk(tmp_path)
    (home,) = tmp_path.iterdir()
    file = home / "hidden-3.npy"
    stored = np.load(file)
    if harm == "cut off":
        os.truncate(file, file.stat().st_size - 8)
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "other numbers":
        np.save(file, stored + 0.01)
    elif harm == "other shape":
        np.save(file, stored[:-1])
    else:
        file.unlink()
    told: list[str] = []
    inputs, rows = batch_of(tokenizer, encoded)
    ours = make().on_disk(tmp_path, told.append)(inputs, rows)
    same(ours, live(tiny("bert"), EMBEDDING, WANTED)(inputs, rows), inputs["attention_mask"].bool())
    assert filled[1:] == [1]
    assert ("does not hold what the teacher says" in told[0]) is (harm == "other numbers")
    np.testing.assert_allclose(np.load(file), stored, atol=1e-6)


def test_an_end_in_the_middle_leaves_nothing_that_looks_whole(make, tmp_path, monkeypatch, filled):
    real = TeacherOutputs._ask

    def failing(self, batch, where, ask):
        if len(where) > 8:
            raise KeyboardInterrupt
        return real(self, batch, where, ask)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherOutputs, "_ask", failing)
        with pytest.raises(KeyboardInterrupt):
            make().on_disk(tmp_path)
    assert not list(tmp_path.rglob("*.npy*"))
    make().on_disk(tmp_path)


def test_what_a_killed_process_left_is_swept_away(make, tmp_path):
    import socket

    make(Wanted(hidden=(1,))).on_disk(tmp_path)
    (home,) = tmp_path.iterdir()
    dead, alive = (home / f"x.npy.{socket.gethostname()}-{pid}.part" for pid in (2**22 + 1, os.getppid()))
    for file in (dead, alive):
        file.write_bytes(b"x")
    make(Wanted(hidden=(2,))).on_disk(tmp_path)
    assert not dead.exists()
    assert alive.exists()


def test_too_little_room_or_a_file_in_the_way(make, tmp_path, monkeypatch):
    import layershare.heal.disk as module

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(StoreError, match=r"need [\d.]+ MB, the disk of .* Make room"):
            make().on_disk(tmp_path / "a")
    assert not list((tmp_path / "a").rglob("*.npy*"))
    (tmp_path / "b").write_text("")
    with pytest.raises(StoreError, match="cannot be kept"):
        make().on_disk(tmp_path / "b")


# ---- in a run


def test_other_students_and_seeds_read_what_the_first_run_wrote(
    tiny, tokenizer, data, tmp_path, filled, capsys
):
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 7)):
        config = QUICK.model_copy(update={"seed": seed})
        student = tiny("bert", seed=1, num_hidden_layers=4 if name != "c" else 2)
        options: dict[str, Any] = {"cache": None if name == "a" else tmp_path / "cache"}
        history = distill(
            student, tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path / name, **options
        )
        losses.append([entry["loss"] for entry in history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert filled == [5]  # by run b; run a sees no text twice, so it keeps nothing
    told = capsys.readouterr().err
    assert told.count("teacher: writing") == 1
    assert told.count("teacher: outputs read from") == 1


def test_more_than_may_be_kept_is_said_before_anything_is_written(tiny, tokenizer, data, tmp_path):
    config = QUICK.model_copy(update={"cache_mb": 0})
    with pytest.raises(
        OptionError, match=r"need [\d.]+ MB for \d+ texts of .*hidden-3.*cache_mb allows 0.0 MB"
    ):
        distill(
            tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path, cache=tmp_path / "cache"
        )
    assert not list(tmp_path.iterdir())


def test_augmented_texts_cannot_be_kept(tiny, tokenizer, data, tmp_path):
    config = QUICK.model_copy(update={"augment": 0.1, "weights": LossWeights(hidden=0)})
    with pytest.raises(OptionError, match="other texts in every epoch"):
        distill(
            tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path, cache=tmp_path / "cache"
        )
