"""Audio classification: one label a sound, several, or a number, see :mod:`layershare.tasks.classification`."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from layershare.config import Config
from layershare.tasks import classification, sound
from layershare.tasks.classification import answers, forward, head, metric_of
from layershare.tasks.task import Task, no_texts

if TYPE_CHECKING:
    from datasets import Dataset


class Settings(Config):
    """How long a sound may be."""

    seconds: float = Field(10.0, gt=0, description="Longer sounds are cut to this many seconds.")


OPTIONAL = frozenset({"labels", "score"})
read = partial(
    classification.read_answers,
    candidates=sound.COLUMNS,
    optional=OPTIONAL,
    beside={"audio": sound.sound},
    folders=sound.folders,
)
"""Reads sounds with their labels: a table with a column of paths, or a folder ``LABEL/SOUND``. Every sound is opened
once, and kept nowhere."""


def configure(values: Mapping[str, Any]) -> Task:
    """The task with these :class:`Settings`."""
    settings = Settings.parse(values, where="audio-classification")

    def encode(processor: Any, dataset: "Dataset", max_length: int, config: Any = None) -> "Dataset":  # noqa: ARG001
        """One row for each different sound; given a model's config, and where the data has them, with ``labels``."""
        return sound.with_samples(
            processor, classification.different(dataset, "audio", config), settings.seconds
        )

    def predict(
        model: Any,
        processor: Any,
        dataset: "Dataset",
        *,
        batch_size: int = 64,
        max_length: int | None = None,  # noqa: ARG001
    ) -> list[Any]:
        rows = sound.with_samples(processor, dataset.select_columns(["audio"]), settings.seconds)
        return answers(task, model, processor, rows, batch_size=batch_size)

    task = Task(
        name="audio-classification",
        auto_class="AutoModelForAudioClassification",
        processor="AutoFeatureExtractor",
        unit="sound",
        metric="accuracy",
        higher_is_better=True,
        columns=sound.COLUMNS | classification.COLUMNS,
        optional=OPTIONAL,
        read=read,
        encode=encode,
        texts=no_texts,
        check=classification.check,
        forward=partial(forward, mask=sound.mask_of),
        evaluate=classification.evaluator(predict),
        metric_of=metric_of,
        inputs=sound.INPUTS,
        collate=partial(sound.collate, seconds=settings.seconds),
        counts=sound.counts,
        learns=True,
        head=head,
        fresh=sound.fresh_processor,
        configure=configure,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
    )
    return task


TASK = configure({})
