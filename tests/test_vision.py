"""Image classification, from files to a healed model: tiny models, drawn images, no network."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from transformers import AutoImageProcessor, AutoModelForImageClassification

import layershare
from layershare.errors import DataError, ModelError, OptionError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.config import DistillConfig
from layershare.heal.folder import heal_folder
from layershare.measure.compare import compare
from layershare.recipe import load, run
from layershare.sharing.folder import share_folder
from layershare.tasks import get_task
from layershare.tasks.calibration import sample_batches

TASK = get_task("image-classification")
SIZES: dict[str, dict[str, Any]] = {
    "vit": dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32),
    "deit": dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32),
    "dinov2": dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2),
    "swin": dict(embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=2, mlp_ratio=2.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 drawn images, ``dark/`` and ``light/``, each different."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, low in (("dark", 0), ("light", 128)):
        (root / label).mkdir()
        for number in range(20):
            pixels = draw.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
            Pictures.fromarray(pixels).save(root / label / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    return trained("vit", folder, tmp_path_factory.mktemp("teacher"))


def trained(kind: str, data: Path, where: Path, steps: int = 60) -> Path:
    size = SIZES[kind] | dict(image_size=8, patch_size=2)
    config = FinetuneConfig(steps=steps, batch_size=8, learning_rate=3e-3, judge_every=steps)
    finetune(kind, data, where / kind, task=TASK, size=size, config=config, quiet=True)
    return where / kind


def test_a_folder_a_table_and_a_data_set_give_the_same_images(folder: Path, tmp_path: Path):
    files = sorted(folder.glob("*/*.png"))
    lines = [f"{file},{file.parent.name}" for file in files]
    (tmp_path / "absolute.csv").write_text("\n".join(["image,label", *lines]))
    rows = [{"file_name": str(f.relative_to(folder)), "class": f.parent.name} for f in files]
    (folder / "beside.jsonl").write_text("\n".join(map(json.dumps, rows)))
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
    columns = {"image": [str(f) for f in files], "label": [f.parent.name for f in files]}
    held = Dataset.from_dict(columns, features=features)
    raw = [{"bytes": f.read_bytes(), "path": f.name} for f in files]
    Dataset.from_dict({"image": raw, "label": columns["label"]}).to_parquet(tmp_path / "bytes.parquet")
    sources: list[Any] = [
        folder,
        tmp_path / "absolute.csv",
        folder / "beside.jsonl",
        held,
        tmp_path / "bytes.parquet",
    ]
    try:
        found = [TASK.read(source) for source in sources]
    finally:
        (folder / "beside.jsonl").unlink()
    hashes = [[one["sha256"] for one in data.train["image"]] for data in found]
    assert all(one == hashes[0] for one in hashes)
    assert len(set(hashes[0])) == 32
    assert all(data.labels == ("dark", "light") for data in found)
    assert found[0].train["image"][0]["bytes"] is None  # a path, and nothing decoded


def test_parts_of_a_folder_are_parts_and_equal_images_do_not_leak(folder: Path, tmp_path: Path):
    for part, names in (("train", range(12)), ("val", range(10, 16)), ("test", range(16, 20))):
        for label in ("dark", "light"):
            (tmp_path / part / label).mkdir(parents=True)
            for n in names:
                target = tmp_path / part / label / f"{part}{n}.png"
                target.write_bytes((folder / label / f"{n:02}.png").read_bytes())
    data = TASK.read(tmp_path)
    assert data.sizes == {"train": 20, "validation": 12, "test": 8}
    assert any("4 of 24" in note for note in data.notes)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not an image", "does not open as an image"),
        (None, "cannot be read"),
        ("cut", "does not open as an image"),
    ],
)
def test_an_image_that_does_not_open_is_named(folder: Path, tmp_path: Path, content: Any, says: str):
    whole = (folder / "dark" / "00.png").read_bytes()
    if content is not None:
        (tmp_path / "bad.png").write_bytes(whole[:100] if content == "cut" else content)
    good = [f"{file},{file.parent.name}" for file in sorted(folder.glob("*/*.png"))]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *good[:30], "bad.png,dark", *good[30:]]))
    with pytest.raises(DataError) as raised:
        TASK.read(tmp_path / "table.csv")
    assert f"{tmp_path / 'table.csv'}, line 32, column 'image'" in str(raised.value)
    assert "bad.png" in str(raised.value)
    assert says in str(raised.value)
    data = get_task("image-classification", skip_bad=True).read(tmp_path / "table.csv")
    assert sum(data.sizes.values()) == 40
    assert any("1 of 41 rows were skipped" in note for note in data.notes)


def test_wrong_columns_and_empty_folders_are_refused(folder: Path, tmp_path: Path):
    (tmp_path / "table.csv").write_text("picture_of,label\na.png,dark\n")
    with pytest.raises(DataError, match="no column for the image"):
        TASK.read(tmp_path / "table.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file with one of the suffixes"):
        TASK.read(tmp_path / "empty")
    with pytest.raises(DataError, match="is a folder"):
        get_task("text-classification").read(folder)


def test_pixels_are_those_of_transformers(teacher: Path, folder: Path):
    processor = AutoImageProcessor.from_pretrained(teacher)
    data = TASK.read(folder)
    rows = TASK.encode(processor, data.test, 0)
    batch = TASK.collate(processor, list(rows))
    opened = [Pictures.open(row["image"]["path"]).convert("RGB") for row in rows]
    assert torch.equal(batch["pixel_values"], processor(opened, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("kind", ["deit", "swin", "dinov2"])
def test_each_backbone_is_trained_shared_healed_and_loads_the_same(kind: str, folder: Path, tmp_path: Path):
    original = trained(kind, folder, tmp_path, steps=3)
    share_folder(
        original, tmp_path / "shared", preset="all", calibration=[folder], task=TASK, merge="regmean"
    )
    config = DistillConfig(steps=3, batch_size=8)
    result = heal_folder(tmp_path / "shared", original, TASK, [folder], tmp_path / "healed", config=config)
    assert result.models[1].layer_parameters_unique < result.models[0].layer_parameters_unique
    assert result.models[1].metrics["accuracy"] == pytest.approx(
        accuracy(tmp_path / "healed", folder), abs=1e-6
    )
    layershare.verify(AutoModelForImageClassification.from_pretrained(tmp_path / "healed"))


def accuracy(model: Path, data: Path) -> float:
    """With transformers alone, and scikit-learn's meaning of accuracy."""
    net, processor = (
        AutoModelForImageClassification.from_pretrained(model),
        AutoImageProcessor.from_pretrained(model),
    )
    test = TASK.read(data).test
    right = 0
    for row in test:
        opened = Pictures.open(row["image"]["path"]).convert("RGB")
        with torch.no_grad():
            said = int(net(**processor(opened, return_tensors="pt")).logits.argmax())
        right += net.config.id2label[said] == row["label"]
    return right / len(test)


def test_a_small_vit_learns_and_its_shared_half_learns_from_it(teacher: Path, folder: Path, tmp_path: Path):
    assert accuracy(teacher, folder) == 1.0
    share_folder(teacher, tmp_path / "shared", preset="adjacent", unique=2)
    config = DistillConfig(steps=40, batch_size=8)
    options: dict[str, Any] = {"config": config, "cache": tmp_path / "cache"}
    result = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "healed", **options)
    assert result.models[1].metrics["accuracy"] == 1.0
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2
    again = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "again", **options)
    assert (
        again.models[1].metrics == result.models[1].metrics
    )  # the same bits, with what was kept of the teacher
    models = {"teacher": teacher, "student": tmp_path / "healed"}
    large, small = compare(models, TASK, TASK.read(folder), batches=(1, 4), runs=1, seconds=0, memory=False)
    assert small.metrics["accuracy"] == 1.0
    assert small.latency[0].tokens is None
    assert small.flops_per_text == large.flops_per_text
    assert "compute per image" in result.model_copy(update={"models": [large, small]}).table()


def test_calibration_batches_hold_pixels(teacher: Path, folder: Path):
    processor = AutoImageProcessor.from_pretrained(teacher)
    config = AutoModelForImageClassification.from_pretrained(teacher).config
    batches = sample_batches(TASK, processor, TASK.read(folder), config, size=16)
    assert [batch["pixel_values"].shape for batch in batches] == [(16, 3, 8, 8), (16, 3, 8, 8)]
    assert set(batches[0]) == {"pixel_values"}


def test_what_makes_no_sense_for_images_is_refused(teacher: Path, folder: Path, tmp_path: Path):
    share_folder(teacher, tmp_path / "shared", preset="all")
    with pytest.raises(OptionError, match="augment"):
        heal_folder(
            tmp_path / "shared", teacher, TASK, [folder], tmp_path / "out", config=DistillConfig(augment=0.1)
        )
    settings = json.loads((tmp_path / "shared" / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.1, 0.1, 0.1]
    (tmp_path / "shared" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="image_mean"):
        heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


def test_an_image_that_changed_during_a_run_stops_it(teacher: Path, folder: Path, tmp_path: Path):
    processor = AutoImageProcessor.from_pretrained(teacher)
    held = io.BytesIO()
    Pictures.new("RGB", (8, 8)).save(held, "png")
    (tmp_path / "one.png").write_bytes(held.getvalue())
    good = [f"{file},{file.parent.name}" for file in sorted(folder.glob("*/*.png"))]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", "one.png,dark", *good]))
    data = TASK.read(tmp_path / "table.csv", split=(1.0, 0.0, 0.0))
    (tmp_path / "one.png").write_bytes((folder / "light" / "00.png").read_bytes())
    with pytest.raises(DataError, match=r"one\.png has changed"):
        TASK.collate(processor, list(TASK.encode(processor, data.train, 0)))


def test_the_committed_recipe_runs_from_end_to_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quick = partial(compare, runs=1, seconds=0, memory=False, batches=(1,))
    monkeypatch.setattr("layershare.measure.evaluate.compare", quick)
    data = json.dumps({"task": TASK.name, "files": [str(folder)]})
    short = [
        f"data={data}",
        "teacher.steps=4",
        "teacher.batch_size=8",
        "distilled.steps=2",
        "distilled.batch_size=8",
    ]
    recipe = load(Path(__file__).parent.parent / "recipes" / "vision.yaml", short)
    report = run(recipe, tmp_path / "out")
    models = json.loads((tmp_path / "out" / "report" / "result.json").read_text())["models"]
    assert [model["label"] for model in models] == ["teacher", "shared", "distilled"]
    for model in models:
        (planned,) = (one.parameters for one in report.planned if one.name == model["label"])
        assert model["parameters_unique"] == planned
    assert {one.state for one in run(recipe, tmp_path / "out").planned} == {"done"}
