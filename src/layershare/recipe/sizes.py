"""What a stage will store and how many steps it takes, before anything is made. No weight is read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from layershare.adapt import adapt
from layershare.errors import StoreError
from layershare.finetune import FinetuneConfig
from layershare.measure.size import weight_files
from layershare.plan import SharingPlan
from layershare.pretrain.config import VOCABULARY
from layershare.pretrain.start import OBJECTIVES, find_start, objective_for
from layershare.recipe.verbs import (
    AdaptStage,
    FinetuneStage,
    PretrainStage,
    PruneStage,
    ShareStage,
    Source,
    Stage,
    trains,
)
from layershare.sharing import make_plan, plan_of, predict
from layershare.sharing.folder import budget_of, from_the_start, plan_for
from layershare.sharing.tie import count
from layershare.stacks import find_stacks
from layershare.store.open import auto_class_of, sketch


@dataclass(frozen=True)
class Size:
    """``net``: the model on the meta device, unshared; ``plan``: how it is shared. Not exact: at most this much."""

    parameters: int
    bytes: int
    net: Any = None
    plan: SharingPlan | None = None
    exact: bool = True


def of_folder(folder: str | Path) -> Size:
    """The size of a model, or of an adapter alone. For a hub name what its config says."""
    try:
        files = weight_files(folder)
    except StoreError:
        return _of(sketch(folder))
    parameters = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            parameters += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    net = sketch(folder) if (Path(folder) / "config.json").is_file() else None
    return Size(
        parameters, sum(file.stat().st_size for file in files), net, None if net is None else plan_of(net)
    )


def of_stage(stage: Stage, sizes: Mapping[str, Size], source: Source | None) -> Size | None:
    """The size of what ``stage`` will make, from the sizes of what it takes; None for a report."""
    if isinstance(stage, PretrainStage):
        return _pretrained(stage, sizes)
    if isinstance(stage, FinetuneStage) and stage.size and source is not None:
        return _fresh(stage, source)
    taken = sizes.get("model")
    if taken is None:
        return None
    if isinstance(stage, FinetuneStage) and source is not None:
        return _with_head(taken, source)
    if isinstance(stage, ShareStage) and taken.net is not None:
        if stage.searches:
            return _within(taken, **stage.options())
        return _shared(taken, plan_for(find_stacks(taken.net), stage.plan, **stage.options()))
    if isinstance(stage, AdaptStage) and taken.net is not None:
        plan = taken.plan if stage.adapter.share == "group" else None
        adapted = adapt(taken.net, stage.adapter, plan=plan)
        added = count(adapted).unique - count(taken.net).unique
        return replace(taken, parameters=taken.parameters + added, bytes=taken.bytes + 4 * added)
    if isinstance(stage, PruneStage):
        return replace(taken, exact=taken.exact and (stage.what == "weights" or stage.keep_shape))
    return taken


def steps_of(stage: Stage, source: Source | None) -> int | None:
    """Optimizer steps, at most; None for a stage without training."""
    if isinstance(stage, FinetuneStage) and not stage.steps and source is not None:
        found = source.kind.read(source.paths, seed=stage.seed, **source.reading())
        rows = len(source.kind.texts(found)) or len(found.train or ())
        config = stage.taken(FinetuneConfig)
        return math.ceil(config.epochs * math.ceil(rows / config.batch_size))
    return getattr(stage, "steps", None) if trains(stage) else None


def _of(net: Any) -> Size:
    counts = count(net)
    return Size(counts.unique, counts.bytes_unique, net, plan_of(net))


def _pretrained(stage: PretrainStage, taken: Mapping[str, Size]) -> Size:
    if "model" in taken:
        return taken["model"]
    start = find_start(stage.model, stage.size)
    kind = OBJECTIVES[objective_for(start.config, stage.objective)].task
    if start.checkpoint is None and stage.tokenizer is None:
        start.config.vocab_size = stage.vocabulary or start.vocabulary or VOCABULARY
    with torch.device("meta"):
        size = _of(auto_class_of(start.config, kind.auto_class).from_config(start.config))
    planned = from_the_start(stage.plan, stage.preset, stage.unique, stage.budget)
    if planned is None:
        return size
    return _shared(size, planned if isinstance(planned, SharingPlan) else make_plan(size.net, **planned))


def _fresh(stage: FinetuneStage, source: Source) -> Size:
    """A model that fine-tuning makes itself."""
    task, start = source.kind, find_start(stage.model, stage.size)
    head = task.head(task.read(source.paths, **source.reading())) if task.head else {}
    for name, value in head.items():
        setattr(start.config, name, value)
    with torch.device("meta"):
        size = _of(auto_class_of(start.config, task.auto_class).from_config(start.config))
    return replace(size, exact="+" not in task.processor)  # a tokenizer that is learnt may give fewer tokens


def _with_head(taken: Size, source: Source) -> Size:
    """Fine-tuning saves in float32, and gives a model a head where it has none."""
    net, task = taken.net, source.kind
    if net is None:
        return replace(taken, exact=False)
    if task.head is not None and "Classification" not in type(net).__name__:
        settings = task.head(task.read(source.paths, **source.reading()))
        config = type(net.config).from_dict(net.config.to_dict() | settings)
        with torch.device("meta"):
            headed = auto_class_of(config, task.auto_class).from_config(config)
        # Of the base, what the head does not use (a pooler, a language-model head) goes.
        change = count(headed).unique - count(net).unique
        parameters = taken.parameters + change
        return replace(taken, parameters=parameters, bytes=4 * parameters, net=headed)
    return replace(taken, bytes=4 * taken.parameters)


def _within(taken: Size, **options: Any) -> Size:
    """What a plan that is still to be found will store at most."""
    stacks, budget = budget_of(find_stacks(taken.net), **options)
    own = count(taken.net, [stack.name for stack in stacks]).layer_unique
    spared = own - int(budget * own)
    size = taken.bytes - spared * taken.net.dtype.itemsize
    return replace(taken, parameters=taken.parameters - spared, bytes=size, exact=False)


def _shared(taken: Size, plan: SharingPlan) -> Size:
    cost = predict(find_stacks(taken.net), plan)
    return replace(
        taken,
        parameters=taken.parameters - (cost.layer_effective - cost.layer_unique),
        bytes=taken.bytes - (cost.layer_bytes_before - cost.layer_bytes),
        plan=plan,
    )
