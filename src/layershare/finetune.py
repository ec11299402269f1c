"""finetune: a checkpoint trained on labelled data, stopped early, its best state kept."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from layershare.errors import DataError, ModelError, OptionError
from layershare.heal.best import Best
from layershare.heal.collator import Collator
from layershare.heal.fit import vocabulary
from layershare.measure.brief import brief, result_of, spread, timed
from layershare.pretrain.start import Start, find_start
from layershare.pretrain.tokenizer import words_for
from layershare.result import Result
from layershare.sharing import plan_of
from layershare.store.open import (
    Processors,
    auto_class_of,
    load_processor,
    load_under_head,
    new_folder,
    sketch,
)
from layershare.tasks import TASKS, Data, Task, get_task
from layershare.tasks.encoding import lengths, usable_length
from layershare.train import TrainConfig, in_plain_factors, train

HEADS: Mapping[str, Mapping[str, Any]] = {
    "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageClassification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForObjectDetection": auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    "AutoModelForPreTraining": auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    "AutoModelForZeroShotImageClassification": auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForAudioClassification": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}
"""Auto class -> model type -> class, of the tasks whose models are made here, or get a head for the data's labels."""


class FinetuneConfig(TrainConfig):
    """How to fine-tune: the fields of :class:`~layershare.train.TrainConfig`, and when to stop."""

    steps: int = Field(0, ge=0, description="Optimizer steps; 0: `epochs` times through the data.")
    epochs: float = Field(5.0, gt=0, description="Times through the training data, at most.")
    batch_size: int = Field(32, ge=1, description="Inputs a step, over all devices together.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak of the learning rate (AdamW).")
    max_length: int = Field(128, ge=4, description="Longer texts are cut to this many tokens.")
    judge_every: int = Field(
        0, ge=0, description="Steps between judgements on the validation split; 0: twice an epoch."
    )
    judge_rows: int = Field(
        0, ge=0, description="Choose on at most so many rows of the validation split, evenly spread; 0: all."
    )
    patience: int = Field(
        4, ge=0, description="Stop after so many judgements in a row without a better one; 0: never."
    )
    dropout: bool = Field(True, description="Whether the model trains with its dropout.")


def finetune(
    model: str | Path,
    data: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    task: str | Task = "text-classification",
    size: Mapping[str, Any] | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    new_head: bool = False,
    config: FinetuneConfig | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> Result:
    """Train a model on labelled data, and save it as ``out``: weights, tokenizer, result.json.

    The task's metric on the validation split is taken every ``judge_every`` steps, and the model that is saved is the
    one that had the best (the first of equals). Until training is done everything is in ``OUT.part``, and the same
    call goes on from the last checkpoint to the same weights.

    Args:
        model: a folder or hub name: an encoder, a decoder or an encoder-decoder, shared or not. For classification a
            head is added, with the labels of the data by name; a model that has one keeps it and its labels. For
            images and sounds also a model type (``vit``) or a JSON file with a config: a model of random weights.
        task: a name, or what :func:`layershare.tasks.get_task` made of it and its settings.
        size: keys of a fresh model's config with other values.
        data, validation, test: files, see :mod:`layershare.tasks`; parts without a file are held out of ``data``.
        columns: role -> column where it is not found by its usual name.
        new_head: replace a head that is there, for other labels.
        resume: go on from the last checkpoint; False begins anew.
        quiet: nothing on standard error.

    Returns:
        A Result with the task's figures on the test split before and after, also in ``out/result.json``.

    Raises:
        OptionError, DataError, ModelError: something given is wrong, e.g. the labels are not the model's; before any
            training. StoreError: there is something in ``out``. TrainingError, KeyboardInterrupt: see
            :func:`layershare.train.train`.
    """
    config, kind = config or FinetuneConfig(), get_task(task)
    if not kind.learns:
        valid = ", ".join(name for name, known in TASKS.items() if known.learns)
        raise OptionError(f"finetune does not do {kind.name}.", f"Valid: {valid}. For text alone: pretrain.")
    if config.ema_decay:
        raise OptionError("ema_decay is not for finetune.", "The best state is kept instead of an average.")
    judged_on, tested = ([] if file is None else [file] for file in (validation, test))
    found = kind.read(data, validation=judged_on, test=tested, columns=columns, seed=config.seed)
    _refuse_unseen(found)
    seconds: dict[str, float] = {}
    fresh = _fresh_start(model, kind, size)
    if fresh is not None:
        tokenizer, net = _fresh(fresh, kind, found, config.seed)
    else:
        tokenizer = load_processor(model, kind.processor)
        net = _model(model, kind, found, tokenizer, new_head, config.seed)
    length = usable_length(tokenizer, net.config, config.max_length)
    assert found.train is not None
    rows = kind.encode(tokenizer, found.train, length, net.config)
    if not kind.self_supervised and "labels" not in rows.column_names:
        raise DataError(
            "The data says nothing of what is true of it, so there is nothing to learn.", "Give labels."
        )
    config = _settled(config, len(rows))
    with new_folder(out, resume=True) as folder:
        judged = found.test if found.test is not None else found.validation
        assert judged is not None

        metric = kind.metric_of(judged)

        chosen_on = spread(found.validation, config.judge_rows)

        def judge(model: Any, dataset: Any = chosen_on) -> dict[str, float]:
            return kind.evaluate(model, tokenizer, dataset, max_length=length)

        with timed("judge before", seconds):
            before = brief("before", net, judge(net, judged))
        best = Best(judge, metric, kind.higher_is_better, config.judge_every, config.patience)
        collator = Collator(tokenizer, collate=kind.varied or kind.collate)
        with timed("train", seconds), in_plain_factors(net):
            history = train(
                net, rows, collator, _loss(kind, config), config, folder,
                resume=resume, quiet=quiet, callbacks=[best], lengths=lengths(kind.counts(rows), rows),
            )  # fmt: skip
            net.cpu()
            best.restore(net)
        with timed("judge after", seconds):
            metrics = judge(net, judged)
        net.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (made := plan_of(net)) is not None:
            made.save(folder / "plan.toml")
        result = result_of(
            [before, brief("after", net, metrics, folder)],
            source=model if fresh is None else fresh.name, task=kind, metric=metric,
            data=found.describe(), seed=config.seed, settings=config,
            plan=made, history=[entry for entry in history if entry["step"] <= best.last], seconds=seconds,
            threads=torch.get_num_threads(),
            notes=[
                *found.notes,
                f"Best on the validation split after step {best.step} of {config.steps}: "
                f"{metric} {best.value:.4f}."
                + (f" Stopped after step {best.last}." if best.last < config.steps else ""),
            ],
        )  # fmt: skip
        result.save(folder / "result.json")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def _fresh_start(model: str | Path, kind: Task, size: Mapping[str, Any] | None) -> Start | None:
    """What ``model`` is made from; None for a checkpoint."""
    if kind.fresh is None:
        if size:
            raise OptionError(f"A model for {kind.name} is not made here.", "Make one with pretrain.")
        return None
    start = find_start(model, size)
    return start if start.checkpoint is None else None


def _fresh(start: Start, kind: Task, data: Data, seed: int) -> tuple[Any, Any]:
    """(processor, model of random weights in float32) of a config, with a head for the labels of the data."""
    assert kind.fresh is not None
    for name, value in (kind.head(data) if kind.head else {}).items():
        setattr(start.config, name, value)
    names = HEADS[kind.auto_class].get(start.config.model_type)
    if names is None:
        raise ModelError(f"{start.config.model_type} has no head for {kind.name} in transformers.")
    kind.check(data, start.config)
    start.config.architectures = [names if isinstance(names, str) else names[0]]  # DeiT has two
    processor = kind.fresh(start.config)
    if "+" in kind.processor:
        processor = Processors(processor, words_for(start.config, kind.texts(data)))
    torch.manual_seed(seed)
    try:
        net = auto_class_of(start.config, kind.auto_class).from_config(start.config).float()
        if kind.begin is not None:
            kind.begin(net)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{start.name}: no model can be made of this config ({why}).") from error
    return processor, net.eval()


def _model(model: str | Path, kind: Task, data: Data, tokenizer: Any, new_head: bool, seed: int) -> Any:
    """The model in float32, with a head for the labels of the data where the task has one."""
    if kind.head is not None:
        net = _with_head(model, kind, data, tokenizer, new_head, seed)
    else:
        if new_head:
            raise OptionError(f"{kind.name} has no head of its own to replace.", "Leave out new_head.")
        torch.manual_seed(seed)  # a head that the checkpoint lacks is drawn
        net = load_under_head(model, kind.auto_class).float()
        kind.check(data, net.config)
    most = vocabulary(net)
    words = getattr(tokenizer, "tokenizer", tokenizer)
    if most is not None and (tokens := max(words.get_vocab().values()) + 1) > most:
        raise ModelError(
            f"The tokenizer has {tokens} tokens, the model only {most}.", "They do not belong together."
        )
    return net


def _with_head(model: str | Path, kind: Task, data: Data, tokenizer: Any, new_head: bool, seed: int) -> Any:
    bare, classes = sketch(model), HEADS[kind.auto_class]
    settings: dict[str, Any] = {}
    has_head = type(bare).__name__ in classes.values()
    if not has_head or new_head:
        assert kind.head is not None
        settings = kind.head(data)
        if has_head and len(settings["id2label"]) != bare.config.num_labels:
            settings["ignore_mismatched_sizes"] = True
    else:
        try:
            kind.check(data, bare.config)
        except DataError as error:
            raise DataError(
                error.message, "Give data with the model's labels, or --new-head for a head of its own."
            ) from None
    if bare.config.model_type not in classes:
        raise ModelError(f"{bare.config.model_type} has no head for classification in transformers.")
    torch.manual_seed(seed)
    net: Any = load_under_head(model, kind.auto_class, **settings).float()
    if has_head and new_head:
        torch.manual_seed(seed)
        _renew_head(net)
    # Decoders look for the last token that is not padding.
    if vocabulary(net) is not None and net.config.pad_token_id is None:
        fill = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        net.config.pad_token_id = next(token for token in fill if token is not None)
    return net


def _renew_head(net: Any) -> None:
    """Draw the weights outside the base model anew, save those that place boxes, which no label changes."""
    base = getattr(net, net.base_model_prefix)
    inside = {id(module) for module in base.modules()}
    for name, module in net.named_modules():
        if module is not net and id(module) not in inside and "bbox" not in name:
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
            module._is_hf_initialized = False
            net._init_weights(module)


def _loss(kind: Task, config: FinetuneConfig) -> Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]]:
    def compute_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        model.train(config.dropout)
        outputs = kind.forward(model, kind.given(batch, learning=True))
        return {"label": kind.loss(outputs, batch.get("labels"))}

    return compute_loss


def _settled(config: FinetuneConfig, rows: int) -> FinetuneConfig:
    """With the numbers that follow from the size of the data."""
    epoch = math.ceil(rows / config.batch_size)
    steps = config.steps or math.ceil(config.epochs * epoch)
    return config.model_copy(
        update={"steps": steps, "judge_every": config.judge_every or math.ceil(epoch / 2)}
    )


def _refuse_unseen(data: Data) -> None:
    if data.train is None or data.validation is None:
        raise DataError(
            "There is nothing to train on, or to choose on.", "Give more data, or a validation file."
        )
    learnt = _labels(data.train)
    for name, part in (("validation", data.validation), ("test", data.test)):
        unseen = sorted(_labels(part) - learnt) if part is not None else []
        if unseen:
            raise DataError(
                f"The label {unseen[0]!r} is in the {name} data but not in the training data "
                f"({', '.join(sorted(learnt))}).",
                "Give training data with every label.",
            )


def _labels(part: Any) -> set[str]:
    """The names of labels in a split: one a row, or several."""
    found = set(part["label"]) if "label" in part.column_names else set()
    several = [role for role in ("labels", "tags") if role in part.column_names]
    return found | {name for role in several for names in part[role] for name in names}
