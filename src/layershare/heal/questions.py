"""What student and teacher are both asked: rows of token ids, and the true answers where the data has them."""

from collections.abc import Mapping
from typing import Any

from layershare.errors import DataError, OptionError
from layershare.heal.config import DistillConfig
from layershare.tasks import Data, Task, causal_lm, masked_lm, text_classification
from layershare.tasks.encoding import usable_length
from layershare.tasks.language import Guessing, Objective, draws, words_of

OBJECTIVES: Mapping[str, Objective] = {
    "masked-lm": masked_lm.OBJECTIVE,
    "causal-lm": causal_lm.OBJECTIVE,
}

Labels = list[int] | list[list[int]]
"""One label a row, or one a token; -100 where there is none."""


def questions(
    task: Task, tokenizer: Any, data: Data, model_config: Any, config: DistillConfig
) -> tuple[Any, Labels | None]:
    """(rows of token ids, their labels or None), both in the order of ``task.encode``.

    Language models are asked for what their objective says. What is masked is drawn once from the seed and stays: so
    the teacher's answers can be kept.
    """
    if data.train is None:
        raise DataError("There is no training data.", "Give a file with texts; labels are not needed.")
    length = usable_length(tokenizer, model_config, config.max_length)
    objective = OBJECTIVES.get(task.name)
    if objective is not None:
        words = words_of(tokenizer, model_config)
        objective.check(words, length, Guessing())
    dataset = task.encode(tokenizer, data.train, length)
    if not len(dataset):
        raise DataError("The training data holds no text to train on.", "Give more.")
    if objective is not None:
        if config.augment:
            raise OptionError(f"augment {config.augment:g} does not go with {task.name}.", "Set it to 0.")
        return _asked(objective, dataset, words, config.seed)
    if task.name == "text-classification" and "label" in data.train.column_names:
        return dataset, text_classification.row_labels(data.train, model_config)
    return dataset, None


def _asked(objective: Objective, dataset: Any, words: Any, seed: int) -> tuple[Any, Labels]:
    from datasets import Dataset

    ids, labels = [], []
    for row, block in enumerate(dataset["input_ids"]):
        batch = objective.batch([block], draws(seed, [row]), words, Guessing())
        ids.append(batch["input_ids"][0].tolist())
        labels.append(batch["labels"][0].tolist())
    return Dataset.from_dict({"input_ids": ids, "attention_mask": dataset["attention_mask"][:]}), labels
