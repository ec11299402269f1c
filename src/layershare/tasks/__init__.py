"""What a model is for: how its data is read, its Auto class, its metric. One file a task.

Importing this package loads neither torch nor transformers, so the command line can list the tasks in its
help.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from layershare.errors import OptionError, nearest
from layershare.tasks import (
    audio_classification,
    causal_lm,
    image_classification,
    image_to_text,
    masked_image_modeling,
    masked_lm,
    object_detection,
    sentence_embedding,
    span_corruption,
    speech_recognition,
    summarization,
    text_classification,
    text_to_speech,
    token_classification,
    translation,
    zero_shot_image_classification,
)
from layershare.tasks.task import Data, Outputs, Task

TASKS: dict[str, Task] = {
    "sentence-embedding": sentence_embedding.TASK,
    "text-classification": text_classification.TASK,
    "token-classification": token_classification.TASK,
    "masked-lm": masked_lm.TASK,
    "causal-lm": causal_lm.TASK,
    "span-corruption": span_corruption.TASK,
    "translation": translation.TASK,
    "summarization": summarization.TASK,
    "image-classification": image_classification.TASK,
    "masked-image-modeling": masked_image_modeling.TASK,
    "image-to-text": image_to_text.TASK,
    "zero-shot-image-classification": zero_shot_image_classification.TASK,
    "object-detection": object_detection.TASK,
    "audio-classification": audio_classification.TASK,
    "speech-recognition": speech_recognition.TASK,
    "text-to-speech": text_to_speech.TASK,
}


def get_task(name: str | Task, settings: Mapping[str, Any] | None = None, *, skip_bad: bool = False) -> Task:
    """The task called ``name``, or the one that is given; an unknown name raises OptionError and names the nearest one.

    settings: the task's own, as ``{"num_beams": 4}`` of translation. skip_bad: rows that cannot be read are left out,
    counted and told, instead of an error.
    """
    task = name if isinstance(name, Task) else TASKS.get(name)
    if task is None:
        raise OptionError(f"There is no task {name!r}.", nearest(str(name), TASKS))
    if settings:
        if task.configure is None:
            raise OptionError(f"{task.name} has no settings of its own (given: {', '.join(settings)}).")
        task = task.configure(settings)
    return replace(task, read=partial(task.read, skip_bad=True)) if skip_bad else task


__all__ = ["TASKS", "Data", "Outputs", "Task", "get_task"]
