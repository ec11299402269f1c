"""Masked image modelling: most of an image is hidden, and the model paints it (masked autoencoders, He et al. 2021,
arXiv 2111.06377). Judged by the error of what was hidden; needs no labels.

An encoder reads the patches that are left, a decoder writes all of them: two stacks, and both may be shared. What is
hidden of an image follows from ``seed`` and the image alone, so all models are asked the same, and what a teacher says
can be kept; ``finetune`` hides something else each time.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from layershare.config import Config
from layershare.errors import ModelError
from layershare.tasks import classification, vision
from layershare.tasks.encoding import batches
from layershare.tasks.reading import read_splits
from layershare.tasks.task import Data, Outputs, Task, no_texts, own_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn


class Settings(Config):
    """What is hidden."""

    seed: int = Field(
        0, ge=0, description="Of the choice of patches that are hidden; how many, the model says."
    )


read = partial(
    read_splits, candidates=vision.COLUMNS, convert={}, beside={"image": vision.image}, folders=vision.folders
)
"""Reads images; whatever stands beside them is not looked at. Every image is opened once, and kept nowhere."""


def encode(
    processor: Any,  # noqa: ARG001 - the same call for every task
    dataset: "Dataset",
    max_length: int,  # noqa: ARG001
    config: Any = None,
) -> "Dataset":
    """One row for each different image, with the number of its ``patches``."""
    rows = classification.different(dataset, "image")
    return rows.add_column("patches", [_patches(config)] * len(rows))


def _patches(config: Any) -> int:
    sides = (
        value if isinstance(value, (list, tuple)) else (value, value)
        for value in (config.image_size, config.patch_size)
    )
    (high, wide), (tall, broad) = sides
    return (high // tall) * (wide // broad)


def collate(
    seed: int, processor: Any, rows: Sequence[Mapping[str, Any]], *, anew: bool = False
) -> "dict[str, Tensor]":
    """``pixel_values`` [B, channels, height, width] and ``noise`` [B, patches]: where it is small, a patch stays."""
    import numpy as np
    import torch

    noise = []
    for row in rows:
        key = [seed, int(row["image"]["sha256"][:16], 16), *([row["position"] + 1] if anew else [])]
        noise.append(np.random.default_rng(key).random(row["patches"], dtype=np.float32))
    return vision.pixel_batch(processor, rows) | {"noise": torch.from_numpy(np.stack(noise))}


def check(data: Data, config: Any) -> None:  # noqa: ARG001 - the same call for every task
    """ModelError for a model that hides nothing."""
    if not hasattr(config, "mask_ratio") or not hasattr(config, "decoder_num_hidden_layers"):
        raise ModelError(
            f"A {config.model_type} model is no masked autoencoder of images.", "Give one, as ViT-MAE."
        )


def begin(model: Any) -> None:
    """Give a fresh model the fixed positions of its patches: transformers 5.23 leaves them 0, in encoder and decoder,
    and never trains them, so that all patches would be one to it."""
    embeddings = model.vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)


def forward(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """Pixels of each patch as values [B, patches, pixels], of which those count that were hidden. Hidden states are the
    encoder's."""
    out = model(**batch, output_hidden_states=hidden_states)
    states = out.hidden_states if hidden_states else ()
    return Outputs(None, None, states, None, values=out.logits, value_weights=out.mask, loss=out.loss)


def metric_of(dataset: "Dataset") -> str:  # noqa: ARG001 - as for every task
    """``error``."""
    return "error"


def configure(values: Mapping[str, Any]) -> Task:
    """The task with these :class:`Settings`."""
    settings = Settings.parse(values, where="masked-image-modeling")

    def evaluate(
        model: Any,
        processor: Any,
        dataset: "Dataset",
        *,
        batch_size: int = 64,
        max_length: int | None = None,  # noqa: ARG001 - as for every task
        teacher: Any = None,
    ) -> dict[str, float]:
        """``error``: the mean squared error of hidden pixels, as the image processor scales them (of each patch by its
        own mean and spread, if the model was trained so); with ``teacher`` also ``agreement``: the Pearson correlation
        of the pixels that both paint."""
        import torch

        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        rows = encode(processor, dataset, 0, model.config)
        total, painted = 0.0, []
        try:
            with torch.no_grad():
                for where, batch in batches(processor, rows, batch_size, task.collate, task.counts):
                    inputs = {name: value.to(device) for name, value in batch.items()}
                    out = forward(model, inputs)
                    assert out.loss is not None
                    total += float(out.loss) * len(where)
                    if teacher is not None:
                        painted.append([_hidden(one) for one in (out, forward(teacher, inputs))])
        finally:
            model.train(was_training)
        figures = {"error": total / len(rows)}
        if teacher is not None:
            both = torch.stack([torch.cat(side) for side in zip(*painted, strict=True)])
            figures["agreement"] = 1.0 if teacher is model else float(torch.corrcoef(both)[0, 1])
        return figures

    task = Task(
        name="masked-image-modeling",
        auto_class="AutoModelForPreTraining",
        processor="AutoImageProcessor",
        unit="image",
        metric="error",
        higher_is_better=False,
        columns=vision.COLUMNS,
        optional=frozenset(),
        read=read,
        encode=encode,
        texts=no_texts,
        check=check,
        forward=forward,
        evaluate=evaluate,
        metric_of=metric_of,
        inputs=("pixel_values", "noise"),
        collate=partial(collate, settings.seed),
        varied=partial(collate, settings.seed, anew=True),
        counts=vision.counts,
        loss=own_loss,
        terms=("labels", "values"),
        learns=True,
        self_supervised=True,
        fresh=vision.fresh_processor,
        begin=begin,
        configure=configure,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
    )
    return task


def _hidden(out: Outputs) -> "Tensor":
    """The pixels of the patches that were hidden, end to end."""
    assert out.values is not None
    assert out.value_weights is not None
    return out.values[out.value_weights.bool()].flatten().float().cpu()


TASK = configure({})
