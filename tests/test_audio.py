"""Audio classification, from files to a healed model: a tiny Wav2Vec2, tones, no network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
import torch
from scipy.signal import resample_poly  # type: ignore[import-untyped]
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from layershare.errors import DataError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.cache import TeacherOutputs
from layershare.heal.config import DistillConfig
from layershare.heal.folder import heal_folder
from layershare.heal.teacher import Wanted, live
from layershare.measure.compare import compare
from layershare.sharing.folder import share_folder
from layershare.tasks import get_task
from layershare.tasks.sound import frames, samples

TASK = get_task("audio-classification", {"seconds": 0.5})
SIZE: dict[str, Any] = dict(
    hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8],
    conv_kernel=[40, 4], conv_stride=[20, 4], num_feat_extract_layers=2, feat_extract_norm="layer",
    do_stable_layer_norm=True, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
    layerdrop=0.0, classifier_proj_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 noisy tones, ``low/`` and ``high/``, of different length, at 8 kHz."""
    root, draw = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for label, pitch in (("low", 200), ("high", 2000)):
        (root / label).mkdir()
        for number in range(20):
            time = np.arange(draw.integers(800, 3000)) / 8000
            wave = 0.5 * np.sin(2 * np.pi * pitch * time) + 0.05 * draw.standard_normal(len(time))
            soundfile.write(root / label / f"{number:02}.wav", wave, 8000)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "wav2vec2"
    config = FinetuneConfig(steps=40, batch_size=8, learning_rate=3e-3, judge_every=40)
    finetune("wav2vec2", folder, out, task=TASK, size=SIZE, config=config, quiet=True)
    return out


def test_a_sound_is_resampled_and_mixed_to_one_channel(tmp_path: Path):
    wave = np.random.default_rng(0).standard_normal((441, 2)) * 0.1
    soundfile.write(tmp_path / "stereo.wav", wave, 44100, subtype="FLOAT")
    (tmp_path / "table.csv").write_text("audio,label\nstereo.wav,a\nstereo.wav,b\n")
    row = TASK.read(tmp_path / "table.csv", split=(1.0, 0.0, 0.0)).train["audio"][0]
    expected = resample_poly(wave.mean(1), 160, 441)
    assert len(samples(row, 16000)) == 160
    np.testing.assert_allclose(samples(row, 16000), expected, atol=1e-6)


def test_a_sound_that_does_not_open_is_named(folder: Path, tmp_path: Path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF, but not really")
    good = [f"{file},{file.parent.name}" for file in sorted(folder.glob("*/*.wav"))]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *good, "bad.wav,low"]))
    with pytest.raises(
        DataError, match=r"table\.csv, line 42, column 'path': .*bad\.wav does not open as a sound"
    ):
        TASK.read(tmp_path / "table.csv")
    skipping = get_task("audio-classification", skip_bad=True)
    assert any("1 of 41 rows were skipped" in note for note in skipping.read(tmp_path / "table.csv").notes)


def test_sounds_are_padded_under_a_mask_or_all_to_one_length(folder: Path):
    rows = TASK.read(folder).train
    masked, unmasked = (Wav2Vec2FeatureExtractor(return_attention_mask=told) for told in (True, False))
    told = TASK.collate(masked, list(TASK.encode(masked, rows, 0))[:3])
    assert told["attention_mask"].sum(1).tolist() == TASK.encode(masked, rows, 0)["samples"][:3]
    blind = TASK.collate(unmasked, list(TASK.encode(unmasked, rows, 0))[:3])
    assert set(blind) == {"input_values"}
    assert blind["input_values"].shape == (3, 8000)
    assert TASK.counts(TASK.encode(unmasked, rows, 0)) == {}


def test_frames_and_mask_are_those_of_the_model():
    torch.manual_seed(0)
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SIZE)).eval()
    batch = {"input_values": torch.randn(2, 3000), "attention_mask": torch.ones(2, 3000, dtype=torch.long)}
    batch["attention_mask"][1, 1234:] = 0
    out = TASK.forward(model, batch, hidden_states=True)
    theirs = model._get_feature_vector_attention_mask(out.hidden_states[0].shape[1], batch["attention_mask"])
    assert out.mask is not None
    assert torch.equal(out.mask.bool(), theirs.bool())
    assert frames(model.config, 3000) == out.hidden_states[0].shape[1]


def test_what_a_teacher_said_is_kept_without_padding(teacher: Path, folder: Path):
    net: Any = AutoModelForAudioClassification.from_pretrained(teacher)
    processor = AutoFeatureExtractor.from_pretrained(teacher)
    rows = TASK.encode(processor, TASK.read(folder).train, 0, net.config)
    wanted = Wanted(hidden=(1,))
    kept = TeacherOutputs(net, TASK, processor, rows, wanted, batch_size=7).in_memory()
    where = torch.tensor([3, 9, 4])
    batch = TASK.collate(processor, [rows[int(i)] for i in where])
    inputs = {name: batch[name] for name in TASK.inputs if name in batch}
    now, then = live(net, TASK, wanted)(inputs, where), kept(inputs, where)
    mask = TASK.forward(net, inputs).mask
    assert mask is not None
    torch.testing.assert_close(then.hidden[1][mask.bool()], now.hidden[1][mask.bool()], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(then.logits, now.logits, atol=1e-4, rtol=1e-4)


def test_a_small_model_learns_and_its_shared_half_learns_from_it(teacher: Path, folder: Path, tmp_path: Path):
    options: dict[str, Any] = {"preset": "adjacent", "unique": 2, "stack": "wav2vec2.encoder.layers"}
    share_folder(teacher, tmp_path / "shared", **options)
    config = DistillConfig(steps=30, batch_size=8)
    healed = heal_folder(
        tmp_path / "shared",
        teacher,
        TASK,
        [folder],
        tmp_path / "healed",
        config=config,
        cache=tmp_path / "cache",
    )
    large, small, _ = healed.models
    assert large.metrics["accuracy"] == small.metrics["accuracy"] == 1.0
    assert small.layer_parameters_unique < 0.6 * large.layer_parameters_unique
    models = {"teacher": teacher, "student": tmp_path / "healed"}
    figures = compare(models, TASK, TASK.read(folder), batches=(1, 2), runs=1, seconds=0, memory=False)
    assert figures[1].metrics["accuracy"] == 1.0
    assert figures[0].latency[0].tokens is None
