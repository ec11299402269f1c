"""What student and teacher are both asked: rows of inputs, and the true answers where the data has them."""

from collections.abc import Mapping
from typing import Any

from layershare.errors import DataError, OptionError
from layershare.heal.config import DistillConfig
from layershare.tasks import Data, Task, causal_lm, masked_lm, span_corruption
from layershare.tasks.encoding import usable_length
from layershare.tasks.language import Guessing, Objective, draws, words_of

OBJECTIVES: Mapping[str, Objective] = {
    "masked-lm": masked_lm.OBJECTIVE,
    "causal-lm": causal_lm.OBJECTIVE,
    "span-corruption": span_corruption.OBJECTIVE,
}


def questions(task: Task, tokenizer: Any, data: Data, model_config: Any, config: DistillConfig) -> Any:
    """Rows as ``task.encode`` gives them, with ``labels`` where the data has any.

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
    dataset = task.encode(tokenizer, data.train, length, model_config)
    if not len(dataset):
        raise DataError(f"The training data holds no {task.unit} to train on.", "Give more.")
    # What is said in a sound, or to be said, is of all its words.
    alone = hasattr(tokenizer, "all_special_ids")
    thinned = alone and "input_ids" in dataset.column_names and task.name != "token-classification"
    if config.augment and (objective is not None or not thinned):
        raise OptionError(f"augment {config.augment:g} does not go with {task.name}.", "Set it to 0.")
    if objective is None or "labels" in dataset.column_names:
        return dataset
    return _asked(objective, dataset, words, config.seed)


def _asked(objective: Objective, dataset: Any, words: Any, seed: int) -> Any:
    from datasets import Dataset

    ids, labels = [], []
    for row, block in enumerate(dataset["input_ids"]):
        batch = objective.batch([block], draws(seed, [row]), words, Guessing())
        ids.append(batch["input_ids"][0].tolist())
        labels.append(batch["labels"][0].tolist())
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": dataset["attention_mask"][:], "labels": labels}
    )
