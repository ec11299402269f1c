"""Zero-shot image classification, from files to a healed model: tiny models, drawn images, no network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from torch.nn import functional
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

import layershare
from layershare import cli
from layershare.errors import DataError, ModelError, OptionError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.cache import TeacherOutputs
from layershare.heal.config import DistillConfig
from layershare.heal.distill import loss_terms
from layershare.heal.folder import heal_folder
from layershare.heal.losses import contrast, similarity
from layershare.heal.teacher import Wanted, live
from layershare.measure.compare import compare
from layershare.sharing.folder import share_folder
from layershare.store.open import load_processor
from layershare.tasks import get_task
from layershare.tasks.answers import output_change
from layershare.tasks.calibration import sample_batches

TASK = get_task("zero-shot-image-classification", {"template": "a {} wall"})
SIZE: dict[str, Any] = {
    "vision_config": dict(
        image_size=8,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
    ),
    "text_config": dict(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    ),
    "projection_dim": 16,
}
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "white": (220, 220, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 noisy images of each of four colours, ``COLOUR/NUMBER.png``."""
    root, draw = tmp_path_factory.mktemp("walls"), np.random.default_rng(0)
    for colour, mean in COLOURS.items():
        (root / colour).mkdir()
        for number in range(15):
            pixels = np.clip(draw.normal(mean, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
            Pictures.fromarray(pixels).save(root / colour / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "clip"
    config = FinetuneConfig(steps=60, batch_size=8, learning_rate=2e-3, judge_every=60)
    finetune("clip", folder, out, task=TASK, size=SIZE, config=config, quiet=True)
    return out


def parts(teacher: Path, folder: Path) -> tuple[Any, Any, Any]:
    model = AutoModelForZeroShotImageClassification.from_pretrained(teacher).eval()
    return model, load_processor(teacher, TASK.processor), TASK.read(folder)


def test_a_small_clip_learns_and_both_its_towers_are_shared_and_healed(
    teacher: Path, folder: Path, tmp_path: Path
):
    share_folder(teacher, tmp_path / "shared", preset="adjacent", unique=2)
    plan = layershare.plan_of(AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "shared"))
    assert plan is not None
    assert {stack.name for stack in plan.stacks} == {
        "vision_model.encoder.layers",
        "text_model.encoder.layers",
    }
    options: dict[str, Any] = {"config": DistillConfig(steps=40, batch_size=8), "cache": tmp_path / "cache"}
    result = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "healed", **options)
    large, small, _ = result.models
    assert large.metrics["accuracy"] == large.metrics["text_recall"] == 1
    assert small.metrics["accuracy"] == 1
    assert {"embedding", "similarity", "contrast", "hidden"} <= set(result.history[-1])
    assert result.history[-1]["contrast"] < result.history[0]["contrast"] / 2
    assert small.layer_parameters_unique < 0.55 * large.layer_parameters_unique
    again = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "again", **options)
    assert again.history == result.history  # the same bits, with what was kept of the teacher
    layershare.verify(AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "healed"))
    models = {"teacher": teacher, "student": tmp_path / "healed"}
    measured = compare(models, TASK, TASK.read(folder), batches=(1,), runs=1, seconds=0, memory=False)
    assert measured[1].metrics == {"accuracy": 1.0, "text_recall": 1.0}


def test_the_pipeline_of_transformers_says_the_same(teacher: Path, folder: Path):
    model, processor, data = parts(teacher, folder)
    own = AutoProcessor.from_pretrained(teacher)
    named = [f"a {colour} wall" for colour in COLOURS]
    judge = pipeline(
        "zero-shot-image-classification", model=model, image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
    )  # fmt: skip
    right = 0
    for row in data.test:
        opened = Pictures.open(row["image"]["path"]).convert("RGB")
        right += judge(opened, candidate_labels=named, hypothesis_template="{}")[0]["label"] == row["caption"]
        batch = own(text=named, images=opened, return_tensors="pt", padding=True)
        assert batch["input_ids"].tolist() == processor.tokenizer(named, padding=True)["input_ids"]
    assert TASK.evaluate(model, processor, data.test)["accuracy"] == right / len(data.test)


def test_embeddings_multiply_to_the_models_logits_and_the_loss_is_its_own(teacher: Path, folder: Path):
    model, processor, data = parts(teacher, folder)
    batch = TASK.collate(processor, list(TASK.encode(processor, data.train, 8).select(range(6))))
    with torch.no_grad():
        out, theirs = TASK.forward(model, batch), model(**batch, return_loss=True)
    assert out.embedding is not None
    torch.testing.assert_close(out.embedding[:, 0] @ out.embedding[:, 1].T, theirs.logits_per_image)
    assert torch.equal(TASK.loss(out, None), theirs.loss)


def test_contrast_is_the_divergence_of_both_directions():
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 2, 4, generator=draw), torch.randn(5, 2, 6, generator=draw)
    ours, theirs = ((x[:, 0] @ x[:, 1].T) / 2 for x in (student, teacher))
    expected = sum(
        functional.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
        for a, b in ((ours, theirs), (ours.T, theirs.T))
    )
    torch.testing.assert_close(contrast(student, teacher, 2.0), expected * 4 / 2)
    assert contrast(teacher, teacher).item() == 0
    flat = student.flatten(0, 1)
    assert torch.equal(similarity(student, teacher), similarity(flat, teacher.flatten(0, 1)))


def test_equal_models_have_no_loss_kept_or_not(teacher: Path, folder: Path):
    model, processor, data = parts(teacher, folder)
    rows = TASK.encode(processor, data.train, 8)
    inputs, numbers = TASK.given(TASK.collate(processor, list(rows.select(range(5))))), torch.arange(5)
    wanted = Wanted(hidden=(3, 7))
    now = live(model, TASK, wanted)(inputs, numbers)
    kept = TeacherOutputs(model, TASK, processor, rows, wanted).in_memory()(inputs, numbers)
    torch.testing.assert_close(kept.embedding, now.embedding)
    assert now.hidden[3].shape == (5, 5, 24)
    assert now.hidden[7].shape == (5, inputs["input_ids"].shape[1], 16)
    for layer in (3, 7):
        torch.testing.assert_close(kept.hidden[layer], now.hidden[layer])
    weights = {"embedding": 10.0, "similarity": 100.0, "contrast": 1.0, "hidden": 1.0}
    outputs = TASK.forward(model, inputs, hidden_states=True)
    terms = loss_terms(outputs, now, weights, [(3, 3), (7, 7)])
    assert set(terms) == set(weights)
    assert all(value.item() == 0 for value in terms.values())
    batches = sample_batches(TASK, processor, data, model.config, size=16)
    assert output_change(TASK, model, batches)(model) == pytest.approx(0, abs=1e-4)


def test_captions_are_read_and_bad_rows_named(folder: Path, tmp_path: Path):
    files = sorted(folder.glob("*/*.png"))
    rows = [{"image": str(file), "text": f"wall number {place}"} for place, file in enumerate(files)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = TASK.read(tmp_path / "captions.jsonl")
    assert set(data.train["caption"]) <= {row["text"] for row in rows}
    labelled = TASK.read(folder)
    assert set(labelled.train["caption"]) == {f"a {colour} wall" for colour in COLOURS}
    assert any("'a {} wall'" in note for note in labelled.notes)
    rows[4]["text"] = None
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"bad\.jsonl, line 5, column 'text': is empty"):
        TASK.read(tmp_path / "bad.jsonl")
    skipping = get_task("zero-shot-image-classification", skip_bad=True)
    assert any("1 of 60 rows were skipped" in note for note in skipping.read(tmp_path / "bad.jsonl").notes)
    (tmp_path / "plain.csv").write_text("\n".join(["image", *map(str, files)]))
    with pytest.raises(DataError, match="no column for the caption"):
        TASK.read(tmp_path / "plain.csv")


def test_what_cannot_be_is_refused(
    teacher: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(OptionError, match="where the label goes"):
        get_task("zero-shot-image-classification", {"template": "a wall"})
    with pytest.raises(ModelError, match="has no head for zero-shot"):
        finetune("vit", folder, tmp_path / "out", task=TASK, quiet=True)
    share_folder(teacher, tmp_path / "shared", preset="all")
    words = ["distill", str(tmp_path / "shared"), "--teacher", str(teacher), "--task", TASK.name]
    words += ["--data", str(folder), "-o", str(tmp_path / "out"), "--set", "weights.relation=1"]
    assert cli.main(words) == 2
    assert "Set weights.relation to 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
