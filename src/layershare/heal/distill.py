"""Distillation: train the shared model (student) to do what the original (teacher) does. Needs no labels."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layershare.errors import OptionError
from layershare.heal import losses
from layershare.heal.cache import TeacherOutputs, model_hash
from layershare.heal.callbacks import tell
from layershare.heal.choose import choose, settle
from layershare.heal.collator import Collator
from layershare.heal.config import DistillConfig, LossWeights
from layershare.heal.disk import megabytes
from layershare.heal.fit import active_weights, check_pair, relation_heads
from layershare.heal.layers import LayerMap, kept_layers, layer_pairs, matching_layers, projections
from layershare.heal.local import by_itself, check_local, layers_of
from layershare.heal.progressive import parts_in_place, replaced_at, stand_in
from layershare.heal.questions import questions
from layershare.heal.relations import attention_maps, capture
from layershare.heal.teacher import Ask, Target, Wanted, live
from layershare.heal.trained import only_trained
from layershare.tasks import Data, Task
from layershare.tasks.encoding import lengths
from layershare.tasks.task import Outputs, label_loss
from layershare.train import in_plain_factors, length_grouped_order, train

__all__ = [
    "DistillConfig",
    "LayerMap",
    "LossWeights",
    "distill",
    "kept_layers",
    "loss_terms",
    "matching_layers",
]


def distill(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    task: Task,
    data: Data,
    config: DistillConfig,
    out: str | Path,
    *,
    layer_map: LayerMap | None = None,
    cache: str | Path | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Train ``student`` in place, not ``teacher``. Returns the history of :func:`layershare.train.train`.

    The loss is the sum of the terms of ``config.weights`` that the task has. Of logits it is
    ``1/2 sum(KL(p || q) T^2 + lambda MSE(z_t, z_s))`` over the number of entries, where p and q are the softened
    distributions of teacher and student and z their logits; see :mod:`layershare.heal.losses` for what circulating
    examples get wrong about it. Where a task answers at every token an entry is a real token, else a text.

    The texts are the different ones of ``data.train``. What the teacher says of them is computed once and reused,
    unless texts are augmented. In memory, that is done where it saves work and fits ``config.cache_mb``; in the folder
    ``cache`` it is always done, for all texts, and every later run with this teacher and these texts reads it from
    there, whatever its student, seed or loss.

    Where the validation split has 32 rows or more, the student is judged on it before and afterwards (with
    ``config.judge_every`` in between too), and is left with the weights that were best by the task's metric: healing
    that makes it worse is undone. The history has the figures as ``validation_...``, and in its last entry
    ``kept_step``, 0 for the weights it began with.

    Args:
        student, teacher: models of the task's kind with one vocabulary; depth and hidden size may differ. Where the
            sizes do, hidden states are compared through linear maps that are trained along and thrown away.
        layer_map: which hidden states are compared where ``config.layer_map`` does not say it (default
            :func:`matching_layers` of the two depths). A student made by dropping layers is best given
            :func:`kept_layers`.
        cache: the folder in which the teacher's outputs are kept; None: in memory.
        out: checkpoints go to ``out/checkpoints``.
        resume: go on from the last checkpoint there.
        quiet: no progress on the terminal.

    Raises:
        DataError: no training text. ModelError: student and teacher do not fit each other, or not the data.
        OptionError: no loss is left, a layer map that names a layer which is not there, or outputs of the teacher
            that are larger than ``config.cache_mb`` allows to keep in ``cache``.
        StoreError: ``cache`` cannot be written.
        TrainingError, KeyboardInterrupt: see :func:`layershare.train.train`.
    """
    if data.train is not None:
        for model in (teacher, student):
            task.check(data, model.config)
    dataset = questions(task, tokenizer, data, teacher.config, config)
    labelled = task.self_supervised or "labels" in dataset.column_names
    weights = active_weights(task, config.weights.model_dump(), labelled)
    check_pair(student, teacher, tokenizer, weights)
    given = layer_map if config.layer_map is None else config.layer_map
    pairs = layer_pairs(student, teacher, given) if "hidden" in weights else []
    if config.local:
        check_local(student, teacher, pairs)
    heads = relation_heads(student, teacher, config) if "relation" in weights else 0
    wanted = _wanted(config, weights, pairs, teacher)
    collator = Collator(tokenizer, config.augment, config.seed, task.collate)
    long = lengths(task.counts(dataset), dataset)
    order = length_grouped_order(long, config.batch_size, config.steps, config.seed)
    ask = _asker(teacher, tokenizer, task, dataset, wanted, order, config, cache, quiet)
    last = student.config.num_hidden_layers - 1 if heads else None
    layers, local = layers_of(student), round(config.local * config.steps)
    mixed = round(config.progressive * config.steps)
    places = parts_in_place(student, teacher, layer_pairs(student, teacher, given)) if mixed else []
    if heads and places:
        del places[len(layers[0]) - 1]  # its relations are compared
    made_of = {"teacher": model_hash(teacher)}
    with (
        in_plain_factors(student),
        only_trained(student, config),
        projections(student, teacher, pairs, config.seed) as maps,
        capture(attention_maps(student, last)) as relations,
    ):

        def phase(step: int, target: Target) -> AbstractContextManager:
            if step < local:
                return by_itself(layers, pairs, target.hidden)
            if step < local + mixed:
                chosen = replaced_at(step - local, mixed, len(places), config.seed)
                return stand_in([places[i] for i in chosen])
            return nullcontext()

        def compute_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
            model.train(config.dropout)
            target = ask(task.given(batch), batch["row"])
            inputs = task.given(batch, learning="labels" in weights)
            with phase(int(batch["position"][0]) // config.batch_size, target):
                outputs = task.forward(model, inputs, hidden_states=bool(pairs))
            terms = loss_terms(
                outputs,
                target,
                weights,
                pairs,
                config.temperature,
                config.lambda_mse,
                batch.get("labels"),
                maps,
                task.loss,
            )
            if heads:
                each = [  # of an encoder-decoder, its encoder's
                    losses.relation(relations[n], target.relations[n], heads, outputs.mask) for n in relations
                ]
                terms["relation"] = weights["relation"] * torch.stack(each).mean()
            return terms

        best = choose(student, teacher, tokenizer, task, data, config)
        history = train(
            student, dataset, collator, compute_loss, config, out, resume=resume, quiet=quiet, lengths=long,
            made_of=made_of, callbacks=[best] if best else [],
        )  # fmt: skip
        if best:
            history[-1]["kept_step"] = settle(best, student, config)
    return history


def loss_terms(
    outputs: Outputs,
    target: Target,
    weights: Mapping[str, float],
    pairs: LayerMap = (),
    temperature: float = 1.0,
    lambda_mse: float = 1.0,
    labels: Tensor | None = None,
    maps: Sequence[Callable[[Tensor], Tensor]] | None = None,
    true_loss: Callable[[Outputs, Any], Tensor] = label_loss,
) -> dict[str, Tensor]:
    """The weighted terms of the loss for one batch, by name; ``weights`` says which. Without labels 0 for equal models.

    Args:
        labels: as ``true_loss`` takes them, e.g. [B], or [B, T] for logits of every token; -100 where there is none.
        maps: for each of ``pairs``, what is applied to the student's hidden states before they are compared.
    """
    terms = {}
    if outputs.embedding is not None and target.embedding is not None:
        if "embedding" in weights:
            terms["embedding"] = losses.embedding_cosine(outputs.embedding, target.embedding)
        if "similarity" in weights:
            terms["similarity"] = losses.similarity(outputs.embedding, target.embedding)
        if "contrast" in weights and outputs.embedding.ndim == 3:
            terms["contrast"] = losses.contrast(outputs.embedding, target.embedding, temperature)
    if outputs.logits is not None:
        mask = outputs.mask_of(outputs.along)
        if target.logits is not None and "logits" in weights:
            terms["logits"] = losses.match_logits(
                outputs.logits, target.logits, temperature, lambda_mse, mask
            )
    if "labels" in weights and (labels is not None or outputs.loss is not None):
        terms["labels"] = true_loss(outputs, labels)
    if outputs.values is not None and target.values is not None and "values" in weights:
        terms["values"] = losses.value_error(outputs.values, target.values, target.value_weights)
    if pairs and "hidden" in weights:
        ours = [outputs.hidden_states[layer + 1] for layer, _ in pairs]
        if maps is not None:
            ours = [project(states) for project, states in zip(maps, ours, strict=True)]
        theirs = [target.hidden[layer] for _, layer in pairs]
        masks = [outputs.mask_of(outputs.axis(layer)) for layer, _ in pairs]
        each = [losses.hidden_mse(a, b, mask) for a, b, mask in zip(ours, theirs, masks, strict=True)]
        terms["hidden"] = torch.stack(each).mean()
    return {name: weights[name] * value for name, value in terms.items()}


def _wanted(config: DistillConfig, weights: Mapping[str, float], pairs: LayerMap, teacher: Any) -> Wanted:
    layer = config.relation_layer
    if "relation" in weights and layer is None:
        layer = teacher.config.num_hidden_layers - 1
    return Wanted(
        answer=bool({"embedding", "similarity", "contrast", "logits", "values"} & weights.keys()),
        hidden=tuple(sorted({theirs for _, theirs in pairs})),
        relations=layer if "relation" in weights else None,
        top=config.top_k if "logits" in weights else 0,
        temperature=config.temperature,
    )


def _asker(
    teacher: Any,
    tokenizer: Any,
    task: Task,
    dataset: Any,
    wanted: Wanted,
    order: Sequence[int],
    config: DistillConfig,
    cache: str | Path | None,
    quiet: bool,
) -> Ask:
    """The teacher, with its answers kept where that is asked for, or possible and saves work."""
    if config.augment and cache is not None:
        raise OptionError(
            "With augment the teacher sees other texts in every epoch, so its outputs cannot be kept.",
            "Leave out the cache folder, or set augment to 0.",
        )
    repeats = len(set(order)) < len(order)
    if wanted == Wanted(answer=False) or config.augment or (cache is None and not repeats):
        return live(teacher, task, wanted)
    from accelerate import PartialState  # type: ignore[import-untyped]

    state = PartialState()
    outputs = TeacherOutputs(
        teacher.to(state.device),
        task,
        tokenizer,
        dataset,
        wanted,
        rows=None if cache is not None else order,
        device=state.device,
        half=config.cache_precision == "float16",
    )
    if cache is None:
        return outputs.in_memory() if outputs.size <= config.cache_mb * 2**20 else live(teacher, task, wanted)
    if outputs.size > config.cache_mb * 2**20:
        raise OptionError(
            f"The teacher's outputs need {outputs.describe()}; cache_mb allows {megabytes(config.cache_mb * 2**20)}.",
            "Raise cache_mb, keep less (cache_precision float16, top_k for logits of a language model, "
            "weights.hidden 0, a shorter layer map), or leave out the cache folder to run the teacher at each step.",
        )
    with state.main_process_first():
        return outputs.on_disk(cache, say=(lambda _: None) if quiet or not state.is_main_process else tell)
