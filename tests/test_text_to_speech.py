"""Text to speech: a tiny SpeechT5 from files to a healed model, and a tiny VITS; tones, no network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
import torch

from layershare.errors import DataError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.cache import TeacherOutputs
from layershare.heal.config import DistillConfig
from layershare.heal.folder import heal_folder
from layershare.heal.layers import depths
from layershare.heal.teacher import Wanted, live
from layershare.sharing import make_plan, plan_of, share, verify
from layershare.sharing.folder import share_folder
from layershare.stacks import find_stacks
from layershare.store.open import load_model, load_processor
from layershare.tasks import get_task
from materials import speecht5

TASK = get_task("text-to-speech", {"seconds": 1.0})
PITCHES = {"cat": 300, "dog": 1200}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 recordings of different length: a tone for each word."""
    folder, draw = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
    lines = ["text,audio"]
    for number in range(40):
        words = (
            list(draw.choice(list(PITCHES), draw.integers(1, 4)))
            + ["a"] * (number % 5)
            + ["the"] * (number // 5)
        )
        waves = [np.sin(2 * np.pi * PITCHES.get(word, 600) * np.arange(1000) / 16000) for word in words[:8]]
        soundfile.write(folder / f"{number:02}.wav", 0.5 * np.concatenate(waves), 16000)
        lines.append(f"{' '.join(words)},{number:02}.wav")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("model") / "speecht5"
    speecht5(path, tokenizer)
    return path


def opened(folder: Path) -> tuple[Any, Any]:
    return load_model(folder, TASK.auto_class), load_processor(folder, TASK.processor)


def batch_of(processor: Any, rows: Any, some: tuple[int, ...] = (0, 3, 9)) -> dict[str, torch.Tensor]:
    return TASK.collate(processor, [rows[i] for i in some])


def test_spectrograms_are_those_of_the_processor_in_whole_steps(folder: Path, table: Path):
    model, processor = opened(folder)
    rows = TASK.encode(processor, TASK.read(table).train, 64, model.config)
    for row in rows.select(range(5)):
        wave, _ = soundfile.read(row["audio"]["path"], dtype="float32")
        theirs = processor(audio_target=wave, sampling_rate=16000, return_tensors="pt")["input_values"][0]
        assert row["frames"] == len(theirs) // 2
        labels = TASK.collate(processor, [row])["labels"][0]
        torch.testing.assert_close(labels, theirs[: len(labels)])
        assert len(labels) == 2 * row["frames"]


def test_numbers_are_the_spectrogram_and_the_loss_the_models(folder: Path, table: Path):
    model, processor = opened(folder)
    rows = TASK.encode(processor, TASK.read(table).train, 64, model.config)
    batch = batch_of(processor, rows)
    with torch.no_grad():
        torch.manual_seed(0)
        out = TASK.forward(model, batch, hidden_states=True)
        torch.manual_seed(0)
        theirs = model(**batch)
    assert out.logits is not None
    assert out.target_mask is not None
    frames = out.target_mask.sum(1).tolist()
    assert frames == [rows[i]["frames"] for i in (0, 3, 9)]
    for mine, other, count in zip(out.logits, theirs.spectrogram, frames, strict=True):
        torch.testing.assert_close(mine[:count].reshape(2 * count, 20), other[: 2 * count])
        assert not mine[count:].any()
    torch.testing.assert_close(TASK.loss(out, batch["labels"]), theirs.loss)
    assert [len(states[0]) for states in out.hidden_states[3:]] == [out.target_mask.shape[1]] * 4
    assert depths(model) == (2, 4)


def test_what_a_teacher_said_is_kept_without_padding(folder: Path, table: Path):
    """Of the encoder: what a decoder reads is dropped at random."""
    model, processor = opened(folder)
    rows = TASK.encode(processor, TASK.read(table).train, 64, model.config)
    wanted = Wanted(hidden=(1, 3))
    kept = TeacherOutputs(model, TASK, processor, rows, wanted, batch_size=7).in_memory()
    where = torch.tensor([3, 9, 4])
    batch = TASK.collate(processor, [rows[int(i)] for i in where])
    now, then = live(model, TASK, wanted)(batch, where), kept(batch, where)
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(then.hidden[1][mask], now.hidden[1][mask], atol=1e-4, rtol=1e-4)
    assert then.hidden[3].shape == now.hidden[3].shape
    assert then.logits.shape == now.logits.shape  # type: ignore[union-attr]


def test_recordings_that_are_too_long_are_named(table: Path):
    with pytest.raises(
        DataError, match=r"table\.csv, line \d+, column 'audio': lasts 0\.\d s, and seconds is 0\.1"
    ):
        get_task("text-to-speech", {"seconds": 0.1}).read(table)


def test_a_small_model_learns_and_its_shared_half_says_the_same_after_reload(
    folder: Path, table: Path, tmp_path: Path
):
    config = FinetuneConfig(steps=60, batch_size=8, learning_rate=5e-3, judge_every=60)
    learnt = finetune(folder, table, tmp_path / "teacher", task=TASK, config=config, quiet=True)
    before, after = (model.metrics["spectrogram_l1"] for model in learnt.models)
    assert after < 0.6 * before
    share_folder(
        tmp_path / "teacher", tmp_path / "shared", preset="basis", budget=0.6, calibration=[table], task=TASK,
        fit="answer",
    )  # fmt: skip
    healed = heal_folder(
        tmp_path / "shared", tmp_path / "teacher", TASK, [table], tmp_path / "healed",
        config=DistillConfig(steps=20, batch_size=8),
    )  # fmt: skip
    large, small, _ = healed.models
    assert small.metrics["spectrogram_l1"] < 0.6 * before
    assert small.layer_parameters_unique < 0.65 * large.layer_parameters_unique
    student, processor = opened(tmp_path / "healed")
    assert plan_of(student) is not None
    verify(student)
    student.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    words = processor(text="cat dog", return_tensors="pt")["input_ids"]
    assert torch.equal(wave(student, words), wave(again, words))


def wave(model: Any, words: torch.Tensor) -> torch.Tensor:
    """What a small vocoder makes of it; seeded, since the decoder drops what it reads at random."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    torch.manual_seed(0)
    sizes = dict(model_in_dim=20, upsample_initial_channel=8, upsample_rates=[4], upsample_kernel_sizes=[8])
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(**sizes, resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]])
    )
    torch.manual_seed(1)
    with torch.no_grad():
        return model.generate_speech(words, torch.zeros(1, 4), vocoder=vocoder.eval(), maxlenratio=2.0)


def test_a_shared_vits_says_the_same_after_reload(tmp_path: Path):
    from transformers import VitsConfig, VitsModel

    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, ffn_dim=32, flow_size=16,
        spectrogram_bins=9, prior_encoder_num_flows=2, prior_encoder_num_wavenet_layers=1, upsample_initial_channel=8,
        upsample_rates=[4], upsample_kernel_sizes=[8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
        depth_separable_num_layers=1, duration_predictor_num_flows=1, duration_predictor_filter_channels=16,
        posterior_encoder_num_wavenet_layers=1,
    )  # fmt: skip
    model = VitsModel(config).eval()
    name = "text_encoder.encoder.layers"
    student = share(model, make_plan(find_stacks(model), "adjacent", unique=2, stack=name))
    student.save_pretrained(tmp_path / "shared")
    back: Any = load_model(tmp_path / "shared")
    assert verify(back).tied > 0
    waves = []
    for one in (student, back):
        torch.manual_seed(0)
        with torch.no_grad():
            waves.append(one(input_ids=torch.arange(1, 9)[None]).waveform)
    assert torch.equal(*waves)
    assert waves[0].std() > 0
