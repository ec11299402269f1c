"""Whether a student and a teacher can be compared at all: said before anything is computed."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from layershare.errors import ModelError, OptionError
from layershare.heal.config import DistillConfig
from layershare.heal.layers import has_towers
from layershare.tasks import Task


def active_weights(task: Task, weights: Mapping[str, float], labelled: bool) -> dict[str, float]:
    """The terms that are left for a task, by name. OptionError when none is, or labels are wanted without any there."""
    usable = ["hidden", "relation", *task.terms]
    if weights["labels"] > 0 and "labels" in usable and not labelled:
        raise OptionError(
            f"weights.labels is {weights['labels']:g}, but {task.name} has no labels to train on here.",
            "Set it to 0: distillation needs none.",
        )
    active = {name: value for name, value in weights.items() if value > 0 and name in usable}
    if not active:
        raise OptionError(
            f"No loss is left for {task.name}: all usable weights are 0.",
            f"Raise one of {', '.join(usable)}.",
        )
    return active


def check_pair(student: Any, teacher: Any, tokenizer: Any, active: Mapping[str, float]) -> None:
    """ModelError where the two read different tokens, give different labels, or embeddings of different width."""
    check_words(student, teacher, tokenizer)
    ours, theirs = student.config, teacher.config
    if {"logits", "labels"} & active.keys():
        check_labels(ours, theirs)
    if "embedding" in active and (widths := [_width(config) for config in (ours, theirs)])[0] != widths[1]:
        raise ModelError(
            f"The embeddings differ in width (student {widths[0]}, teacher {widths[1]}).",
            "Set weights.embedding to 0; weights.similarity serves any width.",
        )


def check_words(student: Any, teacher: Any, tokenizer: Any) -> None:
    """ModelError unless both models read the token ids of ``tokenizer``; nothing to check where they read none."""
    sizes = {
        name: size for name, model in _named(student, teacher) if (size := vocabulary(model)) is not None
    }
    if len(sizes) < 2:
        return
    if sizes["student"] != sizes["teacher"]:
        raise ModelError(
            f"The vocabularies differ: the student has {sizes['student']:,} tokens, the teacher {sizes['teacher']:,}.",
            "Both models must read the same token ids; give the model that the student was made from.",
        )
    words = getattr(tokenizer, "tokenizer", tokenizer)
    if len(words) > sizes["teacher"]:
        raise ModelError(
            f"The tokenizer has {len(words):,} tokens, the models {sizes['teacher']:,}.",
            "Give the tokenizer that belongs to them.",
        )


def vocabulary(model: Any) -> int | None:
    """How many tokens the model's table knows; None for a model that reads no tokens."""
    try:
        table = (model.text_model if has_towers(model) else model).get_input_embeddings()
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def check_processors(student: Any, teacher: Any) -> None:
    """ModelError unless two tokenizers give every token the same id, or two other processors are set alike."""
    if hasattr(student, "get_vocab") and hasattr(teacher, "get_vocab"):
        _check_tokenizers(student, teacher)
        return
    parts = getattr(teacher, "attributes", None) or ()
    for part in parts:
        check_processors(getattr(student, part, None), getattr(teacher, part))
    if parts or not hasattr(teacher, "to_dict") or not hasattr(student, "to_dict"):
        return
    ours, theirs = student.to_dict(), teacher.to_dict()
    names = sorted(set(ours) & set(theirs) - {"processor_class", "_processor_class"})
    if changed := [name for name in names if ours[name] != theirs[name]]:
        raise ModelError(
            f"The two models' inputs are prepared differently: {changed[0]} is {ours[changed[0]]} for the student, "
            f"{theirs[changed[0]]} for the teacher.",
            "Give the model that the student was made from.",
        )


def _check_tokenizers(student: Any, teacher: Any) -> None:
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        other = [token for token in theirs if ours.get(token) != theirs[token]] or list(
            ours.keys() - theirs.keys()
        )
        raise ModelError(
            f"The vocabularies differ in {len(other):,} tokens (one is {sorted(other)[0]!r}).",
            "Both models must read the same token ids; give the model that the student was made from.",
        )


def check_labels(student: Any, teacher: Any) -> None:
    """ModelError unless the logits of two configs mean the same. A student whose labels have no names takes all."""
    if student.num_labels != teacher.num_labels:
        raise ModelError(f"The student has {student.num_labels} labels, the teacher {teacher.num_labels}.")
    ours, theirs = ([str(c.id2label[i]) for i in range(c.num_labels)] for c in (student, teacher))
    if ours != theirs and ours != [f"LABEL_{i}" for i in range(len(ours))]:
        raise ModelError(
            f"The labels differ: the student's are {', '.join(ours)}, the teacher's {', '.join(theirs)}.",
            "Their order counts too. Give the model that the student was made from.",
        )


def relation_heads(student: Any, teacher: Any, config: DistillConfig) -> int:
    """Into how many pieces the queries, keys and values of both models are cut."""
    if not hasattr(teacher.config, "num_attention_heads"):
        raise OptionError(
            f"Relations are not compared in a {teacher.config.model_type} model.",
            "Set weights.relation to 0.",
        )
    heads = config.relation_heads or teacher.config.num_attention_heads
    for name, model in _named(student, teacher):
        size = model.config.hidden_size
        if size % heads:
            raise OptionError(
                f"relation_heads {heads} does not divide the {name}'s hidden size {size}.",
                "Set it to a divisor of both models' sizes.",
            )
    depth = teacher.config.num_hidden_layers
    if config.relation_layer is not None and config.relation_layer >= depth:
        raise OptionError(
            f"relation_layer {config.relation_layer}: the teacher has the layers 0 to {depth - 1}."
        )
    return heads


def _named(student: Any, teacher: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("student", student), ("teacher", teacher)


def _width(config: Any) -> int:
    """Of the embeddings: where two towers meet, of the space that both are projected into."""
    if hasattr(config, "hidden_size"):
        return config.hidden_size
    text = config.text_config
    return getattr(config, "projection_dim", None) or getattr(text, "projection_size", text.hidden_size)
