"""Speech recognition, from files to a healed model: a tiny Whisper and a tiny Wav2Vec2, no network.

A recording is a row of short tones, each a word of one letter: a is low, b high.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
import torch

from layershare import cli
from layershare.errors import DataError, ModelError, OptionError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.cache import TeacherOutputs
from layershare.heal.config import DistillConfig
from layershare.heal.folder import heal_folder
from layershare.heal.teacher import Wanted, live
from layershare.measure.compare import compare
from layershare.result import Result
from layershare.sharing import plan_of, verify
from layershare.sharing.folder import share_folder
from layershare.store.open import load_model, load_processor
from layershare.tasks import get_task, speech_recognition
from layershare.tasks.speech_recognition import transcribe
from layershare.tasks.task import Outputs
from layershare.tasks.word_errors import measure

SETTINGS = {"seconds": 1.0, "max_new_tokens": 8}
TASK = get_task("speech-recognition", SETTINGS)
PITCHES = {"a": 300, "b": 2400}
KINDS = ["whisper", "wav2vec2"]


def whisper(folder: Path) -> None:
    """Listens for a second: 100 frames of a spectrogram, 50 positions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    tokens = ["[PAD]", "[START]", "[END]", *PITCHES]
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[PAD]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends: Any = [("[START]", 1), ("[END]", 2)]
    raw.post_processor = processors.TemplateProcessing(single="[START] $A [END]", special_tokens=ends)
    words = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", bos_token="[START]", eos_token="[END]", unk_token="[PAD]"
    )
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokens), d_model=16, encoder_layers=4, decoder_layers=4, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=80, max_source_positions=50,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), words).save_pretrained(folder)


def wav2vec2(folder: Path, *, letters: str = "AB") -> None:
    """A frame every 20 ms; its alphabet is in upper case."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    folder.mkdir(parents=True)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *letters]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8],
        conv_kernel=[80, 8], conv_stride=[40, 8], num_feat_extract_layers=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
        layerdrop=0.0, vocab_size=len(tokens), pad_token_id=0, ctc_loss_reduction="mean",
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    words = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), words).save_pretrained(folder)


MAKERS = {"whisper": whisper, "wav2vec2": wav2vec2}


def write(folder: Path, rows: list[str], name: str = "table.csv") -> Path:
    draw = np.random.default_rng(0)
    lines = ["audio,text"]
    for number, row in enumerate(rows):
        tones = []
        for word in row.split():
            time = np.arange(draw.integers(700, 900)) / 8000
            tones += [np.sin(2 * np.pi * PITCHES[word] * time), np.zeros(160)]
        wave = 0.5 * np.concatenate(tones) + 0.01 * draw.standard_normal(sum(map(len, tones)))
        soundfile.write(folder / f"{number:03}.wav", wave, 8000)
        lines.append(f"{number:03}.wav,{row}")
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 recordings of one or two words."""
    draw = np.random.default_rng(0)
    rows = [" ".join(draw.choice(["a", "b"], draw.integers(1, 3))) for _ in range(120)]
    return write(tmp_path_factory.mktemp("tones"), rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind, make in MAKERS.items():
        make(root / kind)
    return {kind: root / kind for kind in MAKERS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def opened(folder: Path) -> tuple[Any, Any]:
    return load_model(folder, TASK.auto_class), load_processor(folder, TASK.processor)


def test_which_head_a_model_has_follows_from_its_type(models: dict[str, Path]):
    names = [type(opened(models[kind])[0]).__name__ for kind in KINDS]
    assert names == ["WhisperForConditionalGeneration", "Wav2Vec2ForCTC"]


def test_error_rates_are_those_of_the_fewest_edits():
    """Against edits counted the long way, all texts together."""

    def edits(a: Any, b: Any) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))

    true, said = ["the cat sat", "on"], ["the hat", "on a"]
    words = [edits(a.split(), b.split()) for a, b in zip(true, said, strict=True)]
    found = measure("none", said, true)
    assert found["wer"] == pytest.approx(sum(words) / 4)
    assert found["cer"] == pytest.approx((edits(true[0], said[0]) + edits(true[1], said[1])) / 13)


def test_what_does_not_count_is_the_users():
    told, heard = ["Press one, please!"], ["press 1 please"]
    assert measure("none", heard, told)["wer"] == 1
    assert measure("basic", heard, told)["wer"] == pytest.approx(1 / 3)
    assert measure("english", heard, told)["wer"] == 0


def test_logits_of_whisper_are_those_of_the_transcript_behind_the_start(models: dict[str, Path], table: Path):
    model, processor = opened(models["whisper"])
    rows = TASK.encode(processor, TASK.read(table).train, 16, model.config)
    words = {tuple(ids) for ids in rows["labels"]}
    assert all(ids[-1] == 2 and set(ids[:-1]) <= {3, 4} for ids in words)
    batch = TASK.collate(processor, [rows[i] for i in range(3)])
    start = torch.full((3, 1), 1)
    before = torch.cat([start, batch["labels"][:, :-1].masked_fill(batch["labels"][:, :-1] == -100, 0)], 1)
    with torch.no_grad():
        ours = TASK.forward(model, batch, hidden_states=True)
        theirs = model(input_features=batch["input_features"], decoder_input_ids=before)
    assert torch.equal(ours.logits, theirs.logits)  # type: ignore[arg-type]
    assert ours.encoder == 4
    assert len(ours.hidden_states) == 9


def test_the_loss_of_frames_is_that_of_the_model(models: dict[str, Path], table: Path):
    model, processor = opened(models["wav2vec2"])
    rows = TASK.encode(processor, TASK.read(table).train, 16, model.config)
    batch = TASK.collate(processor, [rows[i] for i in range(5)])
    with torch.no_grad():
        ours = TASK.loss(TASK.forward(model, batch), batch["labels"])
        torch.testing.assert_close(ours, model(**batch).loss)


def test_a_sound_too_short_for_its_transcript_costs_nothing():
    short = Outputs(None, torch.randn(1, 2, 5), (), torch.ones(1, 2).long(), along="source", blank=0)
    assert TASK.loss(short, torch.tensor([[1, 2, 3]])) == 0


def test_letters_are_spelled_as_the_vocabulary_has_them(models: dict[str, Path]):
    words = opened(models["wav2vec2"])[1].tokenizer
    told = speech_recognition._spelled(words, ["a b, a!", "AB"])
    assert told == [[5, 4, 6, 4, 5], [5, 6]]
    with pytest.raises(DataError, match="no character of the transcript '12'"):
        speech_recognition._spelled(words, ["a", "12"])


def test_what_is_heard_does_not_depend_on_the_neighbours(kind: str, models: dict[str, Path], table: Path):
    """In a batch as alone, and alone as the processor and the model say it without any of this."""
    model, processor = opened(models[kind])
    rows = TASK.read(table).train.select(range(6))  # type: ignore[union-attr]
    settings = speech_recognition.Settings(**SETTINGS)
    beside = transcribe(model, processor, rows, settings)
    waves = [speech_recognition.sound.samples(one, 16000) for one in rows["audio"]]
    for wave, said in zip(waves, beside, strict=True):
        batch = processor.feature_extractor(wave, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            if kind == "whisper":
                ids = model.generate(batch["input_features"], max_new_tokens=8)
            else:
                ids = model(batch["input_values"]).logits.argmax(-1)
        assert processor.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip() == said


def test_what_a_teacher_said_is_kept_without_padding(kind: str, models: dict[str, Path], table: Path):
    model, processor = opened(models[kind])
    rows = TASK.encode(processor, TASK.read(table).train, 16, model.config)
    wanted = Wanted(hidden=(1, model.config.num_hidden_layers - 1))
    kept = TeacherOutputs(model, TASK, processor, rows, wanted, batch_size=7).in_memory()
    where = torch.tensor([3, 9, 4])
    batch = TASK.collate(processor, [rows[int(i)] for i in where])
    inputs = {name: batch[name] for name in TASK.inputs if name in batch}
    now, then = live(model, TASK, wanted)(inputs, where), kept(inputs, where)
    out = TASK.forward(model, inputs, hidden_states=True)
    for layer in wanted.hidden:
        mask = out.mask_of(out.axis(layer))
        real = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(then.hidden[layer][real], now.hidden[layer][real], atol=1e-4, rtol=1e-4)
    mask = out.mask_of(out.along)
    assert mask is not None
    torch.testing.assert_close(then.logits[mask.bool()], now.logits[mask.bool()], atol=1e-4, rtol=1e-4)  # type: ignore[index]


def test_sounds_that_are_too_long_are_named_or_skipped(table: Path):
    short = get_task("speech-recognition", {"seconds": 0.25})
    with pytest.raises(
        DataError, match=r"table\.csv, line 2, column 'audio': lasts 0\.\d s, and seconds is 0\.25"
    ):
        short.read(table)
    notes = get_task("speech-recognition", {"seconds": 0.25}, skip_bad=True).read(table).notes
    assert any("of 120 rows were skipped" in note for note in notes)


def test_a_sound_longer_than_the_model_listens_is_named(models: dict[str, Path], tmp_path: Path):
    long = write(tmp_path, ["a b a b a b a b a b a b", "a"])
    task = get_task("speech-recognition")
    model, processor = opened(models["whisper"])
    data = task.read(long, split=(1.0, 0.0, 0.0))
    with pytest.raises(DataError, match=r"000\.wav lasts 1\.\d s, the model listens for 1"):
        task.encode(processor, data.train, 16, model.config)


def test_a_vocabulary_that_is_not_the_models_is_refused(models: dict[str, Path], tmp_path: Path, table: Path):
    wav2vec2(tmp_path / "larger", letters="CDAB")
    model, _ = opened(models["wav2vec2"])
    _, processor = opened(tmp_path / "larger")
    with pytest.raises(ModelError, match="has a token 8, the model only 7"):
        TASK.encode(processor, TASK.read(table).train, 16, model.config)


def test_other_models_are_refused(tiny, table: Path):
    with pytest.raises(ModelError, match="neither an encoder-decoder nor one that spells"):
        TASK.check(TASK.read(table), tiny("gpt2").config)


def test_a_language_is_refused_where_there_are_not_many(models: dict[str, Path], table: Path):
    model, processor = opened(models["whisper"])
    task = get_task("speech-recognition", SETTINGS | {"language": "en"})
    with pytest.raises(OptionError, match="language is for models of many languages"):
        task.encode(processor, task.read(table).train, 16, model.config)


def test_a_small_model_learns_and_its_shared_half_learns_from_it(
    kind: str, models: dict[str, Path], table: Path, tmp_path: Path
):
    teacher = tmp_path / "teacher"
    steps = {"whisper": 250, "wav2vec2": 400}[kind]  # fewer depend on the seed and on the processor
    config = FinetuneConfig(steps=steps, batch_size=16, learning_rate=5e-3, judge_every=steps)
    learnt = finetune(models[kind], table, teacher, task=TASK, config=config, quiet=True)
    assert learnt.models[0].metrics["wer"] > 0.5
    assert learnt.models[1].metrics["wer"] < 0.2
    share_folder(
        teacher, tmp_path / "shared", preset="basis", budget=0.6, calibration=[table], task=TASK, fit="answer"
    )
    heal_folder(
        tmp_path / "shared",
        teacher,
        TASK,
        [table],
        tmp_path / "healed",
        config=DistillConfig(steps=40, batch_size=16),
    )
    back: Any = load_model(tmp_path / "healed", TASK.auto_class)
    plan = plan_of(back)
    assert plan is not None
    assert len(plan.stacks) == {"whisper": 2, "wav2vec2": 1}[kind]
    assert verify(back).tied > 0
    figures = compare(
        {"teacher": teacher, "healed": tmp_path / "healed"}, TASK, TASK.read(table), batches=(1,), runs=1, seconds=0,
        memory=False,
    )  # fmt: skip
    assert figures[1].metrics["wer"] < figures[0].metrics["wer"] + 0.1
    assert figures[1].layer_parameters_unique < 0.65 * figures[0].layer_parameters_unique


def test_the_verbs(kind: str, models: dict[str, Path], table: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [
        "--task",
        "speech-recognition",
        "--data",
        str(table),
        "--task-set",
        "seconds=1",
        "--task-set",
        "max_new_tokens=8",
    ]
    lines = [
        ["finetune", str(models[kind]), *given, "-o", "teacher", "--steps", "2"],
        ["share", "teacher", "--preset", "adjacent", "--unique", "2", "-o", "shared"],
        ["distill", "shared", "--teacher", "teacher", *given, "-o", "small", "--steps", "2"],
        [
            "prune",
            "teacher",
            "--what",
            "positions",
            "--amount",
            "0.25",
            "--by",
            "influence",
            *given,
            "-o",
            "cut",
        ],
    ]
    for line in lines:
        assert cli.main(line) == 0, f"{line}\n{capsys.readouterr().err}"
    told = Result.load(Path("small")).models
    assert [set(one.metrics) for one in told] == [{"wer", "cer", "agreement"}] * 3
