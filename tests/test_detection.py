"""Object detection, from files to a healed model: tiny models, drawn images, no network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import layershare
from layershare import cli
from layershare.errors import DataError, OptionError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.cache import TeacherOutputs
from layershare.heal.config import DistillConfig
from layershare.heal.distill import loss_terms
from layershare.heal.folder import heal_folder
from layershare.heal.teacher import live
from layershare.measure.compare import compare
from layershare.sharing.folder import share_folder
from layershare.tasks import get_task
from layershare.tasks.detections import average_precision

TASK = get_task("object-detection")
YOLOS: dict[str, Any] = dict(
    image_size=[16, 16], patch_size=4, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
    num_detection_tokens=2, initializer_range=0.1,
)  # fmt: skip
DETR: dict[str, Any] = dict(
    backbone_config=dict(
        model_type="resnet", embedding_size=8, hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    ),
    d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 dark images of 16 x 16, each with a light or a grey rectangle in it, the last with none."""
    root, draw = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    rows = []
    for number in range(60):
        pixels = draw.integers(0, 40, (16, 16, 3), dtype=np.uint8)
        wide, high = (int(value) for value in draw.integers(7, 11, 2))
        x, y = int(draw.integers(0, 16 - wide)), int(draw.integers(0, 16 - high))
        label = "light" if number % 2 else "grey"
        there = number < 59
        if there:
            pixels[y : y + high, x : x + wide] = 230 if label == "light" else 110
        Pictures.fromarray(pixels).save(root / f"{number:02}.png")
        objects = {"bbox": [[x, y, wide, high]] * there, "category": [label] * there, "id": [number] * there}
        rows.append({"file_name": f"{number:02}.png", "objects": objects})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    return trained("yolos", YOLOS, folder, tmp_path_factory.mktemp("teacher"), 150)


def trained(kind: str, size: dict[str, Any], data: Path, where: Path, steps: int, task: Any = TASK) -> Path:
    config = FinetuneConfig(steps=steps, batch_size=16, learning_rate=3e-3, judge_every=steps)
    finetune(kind, data, where / kind, task=task, size=size, config=config, quiet=True)
    return where / kind


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_a_folder_a_table_and_a_data_set_give_the_same_boxes(folder: Path, tmp_path: Path):
    rows = rows_of(folder)
    flat = [
        {
            "image": str(folder / row["file_name"]),
            "bbox": row["objects"]["bbox"],
            "labels": row["objects"]["category"],
        }
        for row in rows
    ]
    (tmp_path / "flat.jsonl").write_text("\n".join(map(json.dumps, flat)))
    names = ClassLabel(names=["grey", "light"])
    objects = {"bbox": List(List(Value("float32"))), "category": List(names)}
    held = Dataset.from_dict(
        {
            "image": [one["image"] for one in flat],
            "objects": [{"bbox": one["bbox"], "category": names.str2int(one["labels"])} for one in flat],
        },
        features=Features({"image": Image(), "objects": objects}),
    )
    found = [TASK.read(source) for source in (folder, tmp_path / "flat.jsonl", held)]
    for data in found:
        assert data.labels == ("grey", "light")
        assert data.train["boxes"][:] == found[0].train["boxes"][:]
        assert data.train["labels"][:] == found[0].train["labels"][:]
        assert sum(data.sizes.values()) == 60


@pytest.mark.parametrize(
    ("objects", "column", "says"),
    [
        (
            {"bbox": [[1, 1, 4, 0]], "category": ["grey"]},
            "objects.bbox",
            "a width or height that is not above 0",
        ),
        (
            {"bbox": [[1, 1, -4, 3]], "category": ["grey"]},
            "objects.bbox",
            "a width or height that is not above 0",
        ),
        (
            {"bbox": [[10, 1, 8, 3]], "category": ["grey"]},
            "objects.bbox",
            "not inside of its image, which is 16 x 16",
        ),
        ({"bbox": [[-3, 1, 8, 3]], "category": ["grey"]}, "objects.bbox", "not inside of its image"),
        ({"bbox": [[1, 1, 3]], "category": ["grey"]}, "objects.bbox", "box 0 has 3 numbers, not 4"),
        ({"bbox": [[1, 1, 3, "wide"]], "category": ["grey"]}, "objects.bbox", "'wide' is not a number"),
        ({"bbox": "everywhere", "category": ["grey"]}, "objects.bbox", "expected a list of boxes"),
        ({"bbox": [[1, 1, 3, 3]], "category": "grey"}, "objects.category", "expected a list of labels"),
        ({"bbox": [[1, 1, 3, 3]], "category": ["grey", "light"]}, "objects.category", "2 labels for 1 boxes"),
        (None, "objects.bbox", "is empty"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(
    folder: Path, tmp_path: Path, objects: Any, column: str, says: str
):
    rows = [row | {"file_name": str(folder / row["file_name"])} for row in rows_of(folder)]
    rows[7]["objects"] = objects
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as raised:
        TASK.read(tmp_path / "bad.jsonl")
    assert f"{tmp_path / 'bad.jsonl'}, line 8, column '{column}'" in str(raised.value)
    assert says in str(raised.value)
    data = get_task("object-detection", skip_bad=True).read(tmp_path / "bad.jsonl")
    assert sum(data.sizes.values()) == 59
    assert any("1 of 60 rows were skipped" in note for note in data.notes)


def test_labels_are_those_of_the_image_processor_of_transformers(teacher: Path, folder: Path):
    processor = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    model = AutoModelForObjectDetection.from_pretrained(teacher)
    data = TASK.read(folder)
    rows = TASK.encode(processor, data.train, 0, model.config)
    batch = TASK.collate(processor, list(rows))
    for row, label in zip(data.train, batch["labels"], strict=True):
        told = [
            {"bbox": box, "category_id": model.config.label2id[name], "area": box[2] * box[3], "iscrowd": 0}
            for box, name in zip(row["boxes"], row["labels"], strict=True)
        ]
        opened = Pictures.open(row["image"]["path"]).convert("RGB")
        theirs = processor(opened, annotations={"image_id": 0, "annotations": told}, return_tensors="pt")[
            "labels"
        ][0]
        assert torch.equal(theirs["class_labels"], label["class_labels"])
        torch.testing.assert_close(theirs["boxes"].float().reshape(-1, 4), label["boxes"])


def test_average_precision_of_what_is_known():
    box, other = [0, 0, 10, 10], [50, 50, 10, 10]
    true = [[(0, 1.0, box)], [(1, 1.0, box), (0, 1.0, other)]]
    assert average_precision(true, true) == {"map": 1.0, "map_50": 1.0, "map_75": 1.0}
    swapped = [[(1, 0.9, box)], [(0, 0.9, box), (1, 0.9, other)]]
    assert average_precision(swapped, true) == {"map": 0.0, "map_50": 0.0, "map_75": 0.0}
    # IoU 8/12: found at 0.5, 0.55, 0.6 and 0.65, no more
    near = [[(0, 0.9, [0, 2, 10, 10])]]
    figures = average_precision(near, [[(0, 1.0, box)]])
    assert figures == pytest.approx({"map": 0.4, "map_50": 1.0, "map_75": 0.0}, abs=1e-9)
    assert average_precision([[]], [[(0, 1.0, box)]])["map"] == 0


def test_a_small_yolos_learns_and_its_shared_half_learns_from_it(teacher: Path, folder: Path, tmp_path: Path):
    share_folder(teacher, tmp_path / "shared", preset="adjacent", unique=2)
    config = DistillConfig(steps=80, batch_size=16)
    options: dict[str, Any] = {"config": config, "cache": tmp_path / "cache"}
    result = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "healed", **options)
    large, small, before = result.models
    assert large.metrics["map_50"] > 0.6
    assert small.metrics["map_50"] > 0.8 * large.metrics["map_50"] > before.metrics["map_50"]
    assert small.metrics["agreement"] > before.metrics["agreement"]
    assert large.metrics["agreement"] == 1
    assert small.layer_parameters_unique < 0.53 * large.layer_parameters_unique
    assert {"logits", "values", "hidden"} <= set(result.history[-1])
    again = heal_folder(tmp_path / "shared", teacher, TASK, [folder], tmp_path / "again", **options)
    assert again.models[1].metrics == small.metrics  # the same bits, with what was kept of the teacher
    layershare.verify(AutoModelForObjectDetection.from_pretrained(tmp_path / "healed"))
    measured = compare(
        {"teacher": teacher, "student": tmp_path / "healed"}, TASK, TASK.read(folder), batches=(1,), runs=1, seconds=0,
        memory=False,
    )  # fmt: skip
    assert measured[1].metrics["map"] == pytest.approx(small.metrics["map"], abs=1e-6)


def test_equal_models_have_no_loss_kept_or_not(teacher: Path, folder: Path):
    model = AutoModelForObjectDetection.from_pretrained(teacher).eval()
    processor = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    rows = TASK.encode(processor, TASK.read(folder).train, 0, model.config)
    batch = TASK.collate(processor, list(rows.select(range(5))))
    inputs, numbers = TASK.given(batch), torch.arange(5)
    assert set(inputs) == {"pixel_values"}
    now = live(model, TASK)(inputs, numbers)
    kept = TeacherOutputs(model, TASK, processor, rows).in_memory()(inputs, numbers)
    torch.testing.assert_close(kept.values, now.values)
    torch.testing.assert_close(kept.value_weights, now.value_weights)
    outputs = TASK.forward(model, inputs)
    for value in loss_terms(outputs, now, {"logits": 1.0, "values": 5.0}).values():
        assert value.item() == 0
    moved = TASK.forward(model, {"pixel_values": inputs["pixel_values"] + 0.5})
    assert all(v.item() > 0 for v in loss_terms(moved, now, {"logits": 1.0, "values": 5.0}).values())


def test_the_loss_is_the_models_own(teacher: Path, folder: Path):
    model = AutoModelForObjectDetection.from_pretrained(teacher).eval()
    processor = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    rows = TASK.encode(processor, TASK.read(folder).train, 0, model.config)
    batch = TASK.collate(processor, list(rows.select(range(5))))
    outputs = TASK.forward(model, TASK.given(batch, learning=True))
    assert torch.equal(TASK.loss(outputs, batch["labels"]), model(**batch).loss)


def test_a_detr_is_trained_shared_in_both_stacks_and_healed(folder: Path, tmp_path: Path):
    task = get_task("object-detection", {"size": [32, 32]})
    original = trained("detr", DETR, folder, tmp_path, 3, task)
    share_folder(original, tmp_path / "shared", preset="all")
    config = DistillConfig(steps=2, batch_size=8)
    result = heal_folder(tmp_path / "shared", original, task, [folder], tmp_path / "healed", config=config)
    healed = AutoModelForObjectDetection.from_pretrained(tmp_path / "healed")
    layershare.verify(healed)
    plan = layershare.plan_of(healed)
    assert plan is not None
    assert {stack.name for stack in plan.stacks} == {"model.encoder.layers", "model.decoder.layers"}
    assert result.models[1].layer_parameters_unique < 0.6 * result.models[0].layer_parameters_unique
    assert "hidden" in result.history[-1]


def test_what_cannot_be_is_refused(
    teacher: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    unlabelled = [{"image": str(file)} for file in sorted(folder.glob("*.png"))]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, unlabelled)))
    with pytest.raises(DataError, match="no boxes to learn from"):
        finetune("yolos", tmp_path / "plain.jsonl", tmp_path / "out", task=TASK, size=YOLOS, quiet=True)
    other = [row | {"file_name": str(folder / row["file_name"])} for row in rows_of(folder)]
    for row in other:
        row["objects"]["category"] = ["dog" for _ in row["objects"]["category"]]
    (tmp_path / "dogs.jsonl").write_text("\n".join(map(json.dumps, other)))
    words = ["evaluate", str(teacher), "--task", "object-detection", "--data", str(tmp_path / "dogs.jsonl")]
    assert cli.main(words) == 2
    assert "'dog' of the data is not one of the model's: grey, light" in capsys.readouterr().err
    with pytest.raises(OptionError, match="object-detection"):
        get_task("object-detection", {"sise": [1, 1]})
    assert not (tmp_path / "out").exists()


def test_images_without_boxes_still_heal(teacher: Path, folder: Path, tmp_path: Path):
    unlabelled = [{"image": str(file)} for file in sorted(folder.glob("*.png"))]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, unlabelled)))
    share_folder(teacher, tmp_path / "shared", preset="adjacent", unique=2)
    config = DistillConfig(steps=2, batch_size=8)
    result = heal_folder(
        tmp_path / "shared", teacher, TASK, [tmp_path / "plain.jsonl"], tmp_path / "out", config=config
    )
    assert set(result.models[1].metrics) == {"agreement"}
