"""Image to text, from files to a healed model: tiny models, drawn images, no network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import layershare
from layershare import cli
from layershare.errors import ModelError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.config import DistillConfig
from layershare.heal.folder import heal_folder
from layershare.measure.compare import compare
from layershare.recipe import load, run
from layershare.sharing.folder import share_folder
from layershare.store.open import load_processor
from layershare.tasks import get_task

TASK = get_task("image-to-text", {"template": "the wall is {} today", "num_beams": 1})
SIZE: dict[str, Any] = {
    "encoder": dict(
        image_size=8,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.1,
    ),
    "decoder": dict(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
}
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 noisy images of each of three colours, ``COLOUR/NUMBER.png``."""
    root, draw = tmp_path_factory.mktemp("walls"), np.random.default_rng(0)
    for colour, mean in COLOURS.items():
        (root / colour).mkdir()
        for number in range(15):
            pixels = np.clip(draw.normal(mean, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
            Pictures.fromarray(pixels).save(root / colour / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "writer"
    config = FinetuneConfig(steps=120, batch_size=8, learning_rate=4e-3, judge_every=120)
    finetune("vision-encoder-decoder", folder, out, task=TASK, size=SIZE, config=config, quiet=True)
    return out


def test_a_small_model_learns_to_write_and_its_shared_half_learns_from_it(
    teacher: Path, folder: Path, tmp_path: Path
):
    share_folder(teacher, tmp_path / "shared", preset="adjacent", unique=2)
    plan = layershare.plan_of(AutoModelForImageTextToText.from_pretrained(tmp_path / "shared"))
    assert plan is not None
    assert {stack.name for stack in plan.stacks} == {"encoder.layers", "decoder.bert.encoder.layer"}
    options: dict[str, Any] = {"config": DistillConfig(steps=60, batch_size=8), "cache": tmp_path / "cache"}
    result = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "healed", **options)
    large, small, before = result.models
    assert large.metrics["exact"] == 100
    assert small.metrics["exact"] == 100
    assert small.metrics["perplexity"] < before.metrics["perplexity"]
    assert {"logits", "hidden"} <= set(result.history[-1])
    assert small.layer_parameters_unique < 0.55 * large.layer_parameters_unique
    again = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "again", **options)
    assert again.history == result.history  # the same bits, with what was kept of the teacher
    layershare.verify(AutoModelForImageTextToText.from_pretrained(tmp_path / "healed"))
    models = {"teacher": teacher, "student": tmp_path / "healed"}
    measured = compare(models, TASK, TASK.read(folder), batches=(1,), runs=1, seconds=0, memory=False)
    assert measured[1].metrics["exact"] == 100


def test_what_is_written_is_what_transformers_writes(teacher: Path, folder: Path):
    model = AutoModelForImageTextToText.from_pretrained(teacher).eval()
    images = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    words = AutoTokenizer.from_pretrained(teacher)
    data = TASK.read(folder)
    right = 0
    for row in data.test:
        opened = Pictures.open(row["image"]["path"]).convert("RGB")
        ids = model.generate(**images(opened, return_tensors="pt"), num_beams=1, max_new_tokens=12)
        right += words.decode(ids[0], skip_special_tokens=True).strip() == row["caption"]
        plain = model.generate(
            **images(opened, return_tensors="pt"), num_beams=1, max_new_tokens=12, use_cache=False
        )
        assert torch.equal(ids, plain)
    processor = load_processor(teacher, TASK.processor)
    assert TASK.evaluate(model, processor, data.test)["exact"] == pytest.approx(100 * right / len(data.test))


def test_the_loss_is_that_of_transformers(teacher: Path, folder: Path):
    model = AutoModelForImageTextToText.from_pretrained(teacher).eval()
    processor = load_processor(teacher, TASK.processor)
    rows = TASK.encode(processor, TASK.read(folder).train, 12, model.config)
    batch = TASK.collate(processor, list(rows.select(range(6))))
    out = TASK.forward(model, TASK.given(batch, learning=True))
    torch.testing.assert_close(TASK.loss(out, batch["labels"]), model(**batch).loss)


def test_a_recipe_of_it_runs_and_says_that_its_size_is_a_guess(folder: Path, tmp_path: Path):
    config = {
        "name": "captions",
        "data": {"task": TASK.name, "files": [str(folder)], "settings": dict(TASK.settings)},
        "stages": {
            "teacher": {
                "verb": "finetune", "model": "vision-encoder-decoder", "size": SIZE, "steps": 2, "batch_size": 8,
            },
            "shared": {"verb": "share", "model": "teacher", "preset": "all"},
            "healed": {"verb": "distill", "model": "shared", "teacher": "teacher", "steps": 2, "batch_size": 8},
        },
    }  # fmt: skip
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    report = run(load(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert [one.name for one in report.planned] == ["teacher", "shared", "healed"]
    layershare.verify(AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "healed"))
    assert (tmp_path / "out" / "healed" / "preprocessor_config.json").is_file()
    assert (tmp_path / "out" / "healed" / "tokenizer.json").is_file()


def test_what_cannot_be_is_refused(
    teacher: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ModelError, match="no encoder of images with a decoder"):
        finetune("blip", folder, tmp_path / "out", task=TASK, quiet=True)
    words = ["evaluate", str(teacher), "--task", TASK.name, "--data", str(folder)]
    assert cli.main([*words, "--task-set", "generation.num_beem=2"]) == 2
    assert "num_beams" in capsys.readouterr().err
    (tmp_path / "bad.csv").write_text(f"image,caption\n{folder / 'red' / '00.png'},red\nnone.png,blue\n")
    assert cli.main([*words[:-1], str(tmp_path / "bad.csv")]) == 2
    assert "bad.csv, line 3, column 'image'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
