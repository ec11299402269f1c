"""Image to text: captions, or what is written in an image, by an encoder of images with a decoder of texts.

As :mod:`layershare.tasks.seq2seq`, with an image in place of the text that is read: training and distillation force the
decoder, judging lets it write. Hidden states are those of the encoder, then those of the decoder; both are stacks.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from layershare.errors import ModelError
from layershare.tasks import captions, seq2seq, translation, vision
from layershare.tasks.encoding import batches, pad, usable_length
from layershare.tasks.task import Data, Task
from layershare.tasks.writing import Targets, generate

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

INPUTS = ("pixel_values", "labels")


class Settings(captions.Settings, Targets):
    """What is said of an image, and how the model writes it."""


def measure(written: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """``chrf`` and ``bleu`` of all texts together, and ``exact``, the share of those that are right to the letter; 0 to
    100."""
    exact = sum(one == other for one, other in zip(written, true, strict=True)) / len(true)
    return translation.measure("13a", written, true) | {"exact": 100 * exact}


def collate(processor: Any, rows: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
    """``pixel_values`` [B, channels, height, width], and ``labels`` padded to the longest text [B, U]."""
    batch = vision.pixel_batch(processor.image_processor, rows)
    if "labels" in rows[0]:
        batch |= pad(processor.tokenizer, [{"labels": row["labels"]} for row in rows])
    return batch


def counts(rows: Any, config: Any = None) -> dict[Any, list[int]]:  # noqa: ARG001 - as for every task
    """The tokens of each text; all images become equally many patches."""
    return {"target": [len(ids) for ids in rows["labels"]]}


def check(data: Data, config: Any) -> None:  # noqa: ARG001 - as for every task
    """ModelError for a model that is not an encoder of images with a decoder of texts."""
    if not (config.is_encoder_decoder and hasattr(config, "encoder") and hasattr(config, "decoder")):
        raise ModelError(
            f"A {config.model_type} model is no encoder of images with a decoder of texts.",
            "Give a vision-encoder-decoder, as TrOCR, Donut or ViT with GPT-2.",
        )


def fresh_processor(config: Any) -> Any:
    """The image processor of a model that is made from this config alone, whose decoder is told to be one."""
    config.decoder.is_decoder = config.decoder.add_cross_attention = True
    return vision.fresh_processor(config)


def metric_of(dataset: "Dataset") -> str:  # noqa: ARG001 - as for every task
    """``chrf``."""
    return "chrf"


def configure(values: Mapping[str, Any]) -> Task:
    """The task with these :class:`Settings`."""
    settings = Settings.parse(values, where="image-to-text")

    def encode(processor: Any, dataset: "Dataset", max_length: int, config: Any = None) -> "Dataset":
        """One row for each different pair: the image, and the token ids of its caption as ``labels``."""
        rows = captions.pairs(dataset)
        most = settings.target_length or max_length
        labels = seq2seq.targets(processor.tokenizer, rows["caption"][:], most, config)
        return rows.remove_columns("caption").add_column("labels", labels)

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
        """The figures of :func:`measure` of what the model writes, and ``perplexity`` of the captions; with ``teacher``
        also ``agreement``: the share of the captions' tokens for which both models, forced, have the same first
        choice."""
        rows = encode(processor, dataset, usable_length(processor, model.config, max_length), model.config)
        most = usable_length(processor, model.config, settings.target_length or max_length)
        asked = batches(processor, rows.select_columns("image"), batch_size, collate, vision.counts)
        written = generate(model, processor.tokenizer, asked, settings, most)
        columns = {name: rows[name][:] for name in ("image", "labels")}
        forced = seq2seq.forced(model, processor, columns, batch_size, teacher, collate, counts)
        return measure(written, captions.pairs(dataset)["caption"][:]) | forced

    return Task(
        name="image-to-text",
        auto_class="AutoModelForImageTextToText",
        processor="AutoImageProcessor+AutoTokenizer",
        unit="image",
        metric="chrf",
        higher_is_better=True,
        columns=captions.COLUMNS,
        optional=captions.OPTIONAL,
        read=partial(captions.read_captions, settings.template),
        encode=encode,
        texts=captions.texts,
        check=check,
        forward=seq2seq.forward,
        evaluate=evaluate,
        metric_of=metric_of,
        inputs=INPUTS,
        collate=collate,
        counts=counts,
        learns=True,
        fresh=fresh_processor,
        configure=configure,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
    )


TASK = configure({})
