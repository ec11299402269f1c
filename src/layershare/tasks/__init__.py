"""What a model is for: how its data is read, its Auto class, its metric. One file a task.

Importing this package loads neither torch nor transformers, so the command line can list the tasks in its
help.
"""

from layershare.errors import OptionError, nearest
from layershare.tasks import causal_lm, masked_lm, sentence_embedding, text_classification
from layershare.tasks.task import Data, Outputs, Task

TASKS: dict[str, Task] = {
    "sentence-embedding": sentence_embedding.TASK,
    "text-classification": text_classification.TASK,
    "masked-lm": masked_lm.TASK,
    "causal-lm": causal_lm.TASK,
}


def get_task(name: str) -> Task:
    """The task called ``name``; an unknown name raises OptionError and names the nearest one."""
    if name not in TASKS:
        raise OptionError(f"There is no task {name!r}.", nearest(name, TASKS))
    return TASKS[name]


__all__ = ["TASKS", "Data", "Outputs", "Task", "get_task"]
