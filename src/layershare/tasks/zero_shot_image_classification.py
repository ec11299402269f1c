"""Zero-shot image classification: which of some texts belongs to an image (CLIP: Radford et al. 2021, arXiv
2103.00020).

A tower reads images, another one texts; both are stacks, and both may be shared. Training asks, in a batch, which text
belongs to which image, by the model's own loss. Distillation compares the whole matrix of the batch with the teacher's,
softened (``weights.contrast``), beside the embeddings and the hidden states of both towers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from layershare.errors import ModelError
from layershare.tasks import captions, vision
from layershare.tasks.encoding import batches, pad, usable_length
from layershare.tasks.task import Data, Outputs, Task, own_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

INPUTS = ("input_ids", "attention_mask", "pixel_values")
CHUNK = 1024


def encode(
    processor: Any,
    dataset: "Dataset",
    max_length: int,
    config: Any = None,  # noqa: ARG001 - the same call for every task
) -> "Dataset":
    """One row for each different pair: the image, and the token ids of its caption."""
    rows = captions.pairs(dataset)
    tokenizer = processor.tokenizer
    # A model that is not told of padding takes it for text, so all texts are then as long as those it was trained on.
    how = {"padding": False if "attention_mask" in tokenizer.model_input_names else "max_length"}
    encoded = tokenizer(rows["caption"][:], truncation=True, max_length=max_length, **how)
    for name in INPUTS[:2]:
        if name in encoded:
            rows = rows.add_column(name, encoded[name])
    return rows.remove_columns("caption")


def collate(processor: Any, rows: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
    """``pixel_values`` [B, channels, height, width], token ids [B, T] and their mask."""
    kept = [{name: row[name] for name in INPUTS[:2] if name in row} for row in rows]
    return pad(processor.tokenizer, kept) | vision.pixel_batch(processor.image_processor, rows)


def counts(rows: Any, config: Any = None) -> dict[Any, list[int]]:  # noqa: ARG001 - as for every task
    """The tokens of each text; all images become equally many patches."""
    return {"target": [len(ids) for ids in rows["input_ids"]]}


def check(data: Data, config: Any) -> None:  # noqa: ARG001 - as for every task
    """ModelError for a model that does not read images and texts side by side."""
    if not hasattr(config, "vision_config") or not hasattr(config, "text_config"):
        raise ModelError(
            f"A {config.model_type} model has not one tower for images and one for texts.", "Give a CLIP."
        )


def forward(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """Embeddings [B, 2, d] of images and their texts, so long that their products are the model's logits. Hidden states
    are those of the images' tower, then those of the texts'."""
    import torch
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]

    out = model(**batch, return_loss=True, output_hidden_states=hidden_states)
    scale: Any = extract_model_from_parallel(model).logit_scale
    pair = torch.stack([out.image_embeds, out.text_embeds], 1) * (scale.exp() ** 0.5)
    states, encoder = (), None
    if hidden_states:
        seen, read = out.vision_model_output.hidden_states, out.text_model_output.hidden_states
        states, encoder = seen + read[1:], len(seen) - 1
    return Outputs(pair, None, states, None, batch.get("attention_mask"), encoder=encoder, loss=out.loss)


def embed(
    model: Any, processor: Any, dataset: "Dataset", *, batch_size: int = 64, max_length: int | None = None
) -> "tuple[Tensor, Tensor]":
    """Unit vectors [N, d] of the images of a split, and [M, d] of its different captions; no gradients, and the model's
    mode is left as it was."""
    import torch
    from torch.nn.functional import normalize

    rows = encode(processor, dataset, usable_length(processor, model.config, max_length))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found: dict[int, Tensor] = {}
    try:
        with torch.no_grad():
            for where, batch in batches(processor, rows, batch_size, collate, counts):
                out = forward(model, {name: value.to(device) for name, value in batch.items()})
                assert out.embedding is not None
                found |= dict(zip(where, normalize(out.embedding.float().cpu(), dim=-1), strict=True))
    finally:
        model.train(was_training)
    both = torch.stack([found[i] for i in range(len(rows))])
    said = captions.pairs(dataset)["caption"][:]
    first = {caption: place for place, caption in reversed(list(enumerate(said)))}
    return both[:, 0], both[[first[caption] for caption in dict.fromkeys(said)], 1]


def nearest(asked: "Tensor", among: "Tensor") -> "Tensor":
    """For each of [N, d] the number of the one of [M, d] with the largest product."""
    import torch

    return torch.cat([(part @ among.T).argmax(1) for part in asked.split(CHUNK)])


def evaluate(
    model: Any,
    processor: Any,
    dataset: "Dataset",
    /,
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    teacher: Any = None,
) -> dict[str, float]:
    """``accuracy``: the share of images whose own caption is nearest, of all the different captions of the split (with
    captions that are made of labels: of zero-shot classification; else R@1 from images to texts). ``text_recall``: the
    share of captions whose nearest image is one of theirs (R@1 from texts to images). With ``teacher`` also
    ``agreement``: the share of images for which both choose the same caption."""
    import torch

    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    images, written = embed(model, processor, dataset, **options)
    said = captions.pairs(dataset)["caption"][:]
    number = {caption: i for i, caption in enumerate(dict.fromkeys(said))}
    own = torch.tensor([number[caption] for caption in said])
    chosen = nearest(images, written)
    figures = {
        "accuracy": float((chosen == own).float().mean()),
        "text_recall": float((own[nearest(written, images)] == torch.arange(len(written))).float().mean()),
    }
    if teacher is not None:
        theirs = chosen if teacher is model else nearest(*embed(teacher, processor, dataset, **options))
        figures["agreement"] = float((chosen == theirs).float().mean())
    return figures


def metric_of(dataset: "Dataset") -> str:  # noqa: ARG001 - as for every task
    """``accuracy``."""
    return "accuracy"


def configure(values: Mapping[str, Any]) -> Task:
    """The task with these :class:`~layershare.tasks.captions.Settings`."""
    settings = captions.Settings.parse(values, where="zero-shot-image-classification")
    return Task(
        name="zero-shot-image-classification",
        auto_class="AutoModelForZeroShotImageClassification",
        processor="AutoImageProcessor+AutoTokenizer",
        unit="image",
        metric="accuracy",
        higher_is_better=True,
        columns=captions.COLUMNS,
        optional=captions.OPTIONAL,
        read=partial(captions.read_captions, settings.template),
        encode=encode,
        texts=captions.texts,
        check=check,
        forward=forward,
        evaluate=evaluate,
        metric_of=metric_of,
        inputs=INPUTS,
        collate=collate,
        counts=counts,
        loss=own_loss,
        terms=("embedding", "similarity", "contrast", "labels"),
        learns=True,
        self_supervised=True,
        fresh=vision.fresh_processor,
        configure=configure,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
    )


TASK = configure({})
