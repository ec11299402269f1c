"""Masked image modelling, from files to a healed model: tiny models, drawn images, no network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from transformers import AutoImageProcessor, AutoModelForPreTraining

import layershare
from layershare import cli
from layershare.errors import ModelError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.cache import TeacherOutputs
from layershare.heal.config import DistillConfig
from layershare.heal.distill import loss_terms
from layershare.heal.folder import heal_folder
from layershare.heal.teacher import live
from layershare.measure.compare import compare
from layershare.sharing.folder import share_folder
from layershare.tasks import get_task
from layershare.tasks.answers import output_change
from layershare.tasks.calibration import sample_batches

TASK = get_task("masked-image-modeling")
SIZE: dict[str, Any] = dict(
    image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
    decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=32,
    initializer_range=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 16 x 16 of one colour each, getting lighter to one side."""
    root, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    slope = np.linspace(0.5, 1.0, 16)[None, :, None]
    for number in range(60):
        pixels = draw.integers(40, 250, 3)[None, None] * slope * np.ones((16, 1, 1))
        Pictures.fromarray(pixels.astype(np.uint8)).save(root / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "mae"
    config = FinetuneConfig(steps=150, batch_size=16, learning_rate=3e-3, judge_every=150)
    finetune("vit_mae", folder, out, task=TASK, size=SIZE, config=config, quiet=True)
    return out


def test_both_stacks_are_shared_and_the_student_learns_to_paint_again(
    teacher: Path, folder: Path, tmp_path: Path
):
    share_folder(teacher, tmp_path / "shared", preset="all")
    plan = layershare.plan_of(AutoModelForPreTraining.from_pretrained(tmp_path / "shared"))
    assert plan is not None
    assert {stack.name for stack in plan.stacks} == {"vit.layers", "decoder.decoder_layers"}
    options: dict[str, Any] = {"config": DistillConfig(steps=60, batch_size=16), "cache": tmp_path / "cache"}
    result = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "healed", **options)
    large, small, before = result.models
    assert large.metrics["error"] < 0.1  # of colours whose variance is about 0.3
    assert small.metrics["error"] < 0.5 * before.metrics["error"]
    assert small.metrics["agreement"] > max(0.9, before.metrics["agreement"])
    assert small.layer_parameters_unique < 0.4 * large.layer_parameters_unique
    again = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "again", **options)
    assert again.models[1].metrics == small.metrics  # the same bits, with what was kept of the teacher
    layershare.verify(AutoModelForPreTraining.from_pretrained(tmp_path / "healed"))
    models = {"teacher": teacher, "student": tmp_path / "healed"}
    measured = compare(models, TASK, TASK.read(folder), batches=(1,), runs=1, seconds=0, memory=False)
    assert measured[1].metrics["error"] == pytest.approx(small.metrics["error"], rel=1e-4)


def test_a_fresh_model_knows_where_its_patches_are(teacher: Path):
    model = AutoModelForPreTraining.from_pretrained(teacher)
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        apart = torch.cdist(table[0], table[0]) + torch.eye(17)
        assert table.shape[1] == 17
        assert apart.min() > 0.1


def test_the_error_is_that_of_the_hidden_pixels(teacher: Path, folder: Path):
    model = AutoModelForPreTraining.from_pretrained(teacher).eval()
    processor = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    data = TASK.read(folder)
    batch = TASK.collate(processor, list(TASK.encode(processor, data.test, 0, model.config)))
    with torch.no_grad():
        out = model(**batch)
    # the patches cut by hand: channels last, as the model's decoder writes them
    pixels = batch["pixel_values"].reshape(-1, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 48)
    hidden = out.mask.bool()
    assert hidden.sum(1).tolist() == [12] * len(hidden)
    expected = float((out.logits[hidden] - pixels[hidden]).square().mean())
    assert TASK.evaluate(model, processor, data.test)["error"] == pytest.approx(expected, rel=1e-5)


def test_what_is_hidden_follows_from_the_seed_and_the_image_but_varies_in_training(
    teacher: Path, folder: Path
):
    config = AutoModelForPreTraining.from_pretrained(teacher).config
    processor = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    rows = list(TASK.encode(processor, TASK.read(folder).train, 0, config))
    noise = TASK.collate(processor, rows)["noise"]
    assert torch.equal(noise, TASK.collate(processor, rows[::-1])["noise"].flip(0))
    other = get_task("masked-image-modeling", {"seed": 1})
    assert not torch.equal(noise, other.collate(processor, rows)["noise"])
    assert TASK.varied is not None
    first, second = (
        TASK.varied(processor, [row | {"position": i} for i, row in enumerate(rows, start)])["noise"]
        for start in (0, 1000)
    )
    assert not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in noise}) == len(rows)


def test_equal_models_have_no_loss_kept_or_not(teacher: Path, folder: Path):
    model = AutoModelForPreTraining.from_pretrained(teacher).eval()
    processor = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    data = TASK.read(folder)
    rows = TASK.encode(processor, data.train, 0, model.config)
    inputs, numbers = TASK.given(TASK.collate(processor, list(rows.select(range(5))))), torch.arange(5)
    now = live(model, TASK)(inputs, numbers)
    kept = TeacherOutputs(model, TASK, processor, rows).in_memory()(inputs, numbers)
    torch.testing.assert_close(kept.values, now.values)
    assert torch.equal(kept.value_weights, now.value_weights)
    weights = {"values": 5.0, "labels": 1.0}
    terms = loss_terms(TASK.forward(model, inputs), now, weights, true_loss=TASK.loss)
    assert terms["values"].item() == 0
    assert terms["labels"].item() == pytest.approx(model(**inputs).loss.item(), rel=1e-6)
    batches = sample_batches(TASK, processor, data, model.config, size=16)
    change = output_change(TASK, model, batches)
    assert change(model) == pytest.approx(0, abs=1e-4)
    torch.nn.init.zeros_(model.decoder.decoder_pred.weight)
    assert change(model) > 0.1


def test_a_model_that_hides_nothing_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ModelError, match="no masked autoencoder"):
        finetune("bert", folder, tmp_path / "out", task=TASK, quiet=True)
    (tmp_path / "bad.csv").write_text(f"image\n{folder / '00.png'}\nnowhere.png\n")
    words = ["finetune", "vit_mae", "--task", TASK.name, "--data", str(tmp_path / "bad.csv")]
    assert cli.main([*words, "-o", str(tmp_path / "out")]) == 2
    assert "bad.csv, line 3, column 'image'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
