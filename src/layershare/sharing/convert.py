"""share and unshare: from a model and a plan to a shared model, and back."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layershare.errors import PlanError
from layershare.plan import SharingPlan
from layershare.sharing import lowrank, merge
from layershare.sharing.carry import mark, plan_of, unmark
from layershare.sharing.depth import drop_layers
from layershare.sharing.layout import Job, Layout, find
from layershare.sharing.statistics import Grams, collect
from layershare.sharing.tie import fill, install, layout_of, tie, undo, verify
from layershare.stacks import find_stacks


def share(
    model: PreTrainedModel, plan: SharingPlan, *, calibration: Iterable[Mapping[str, Any]] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A new model that shares parameters as ``plan`` says; ``model`` is untouched.

    ``calibration``: batches for ``model(**batch)``. With it, low-rank corrections and bases are fitted where the
    activations are (whitened), and the merge ``regmean`` becomes possible; without it the weights alone decide.
    Raises :class:`~layershare.errors.PlanError` if the plan does not fit, or needs a calibration that is not given.
    """
    if plan_of(model) is not None:
        raise PlanError(f"{type(model).__name__} is shared already.", "Call layershare.unshare(model) first.")
    student = dropped(model, plan)
    layout = layout_of(student, plan)
    _refuse_idle(plan, layout)
    if calibration is None and (
        needy := next((job for job in layout.jobs if job.group.merge == "regmean"), None)
    ):
        raise PlanError(
            f"merge 'regmean' of {needy.names[0]} needs activations.", "Give calibration batches."
        )
    wanted = {name for job in layout.jobs if _uses_activations(job) for name in job.modules}
    grams = (
        _statistics(model, plan, sorted(wanted), calibration) if calibration is not None and wanted else {}
    )
    values = solve(layout, dict(student.named_parameters(remove_duplicate=False)), grams)
    install(student, layout)
    fill(student, values)
    tie(student, layout)
    verify(student, plan)
    if layout.jobs or layout.gates:  # a model that only lost positions is an ordinary one
        mark(student, plan, made={"whitened": bool(grams)})
    return student


def _statistics(
    model: PreTrainedModel,
    plan: SharingPlan,
    modules: Sequence[str],
    calibration: Iterable[Mapping[str, Any]],
) -> Grams:
    """What the student's ``modules`` see in the original (measured: better than in a model with positions dropped)."""
    stacks = find_stacks(model, [one.name for one in plan.stacks])
    kept = {find(stacks, one.name).name: one.kept for one in plan.stacks}
    in_original = {}
    for name in modules:
        stack = next(stack for stack in kept if name.startswith(f"{stack}."))
        layer, _, rest = name[len(stack) + 1 :].partition(".")
        in_original[name] = f"{stack}.{kept[stack][int(layer)]}.{rest}"
    grams = collect(model, in_original.values(), calibration)
    return {name: grams[original] for name, original in in_original.items()}


def _refuse_idle(plan: SharingPlan, layout: Layout) -> None:
    """A plan whose groups name positions that have nothing in common is a mistake, not an ordinary model."""
    groups = [group for one in plan.stacks for group in one.groups if len(group.positions) > 1]
    if groups and not layout.jobs:
        raise PlanError(
            f"the plan shares nothing: {layout.notes[0]}." if layout.notes else "the plan shares nothing."
        )


def unshare(model: PreTrainedModel) -> PreTrainedModel:
    """A new model with the same function in which every position has weights of its own.

    Dropped positions stay dropped. Gates have no place in the original architecture: a model with gates keeps them,
    and a plan that says so; without gates the result is a plain model that needs no layershare to load.
    """
    dense = copy.deepcopy(model)
    plan = plan_of(dense)
    if plan is None:
        return dense
    undo(dense, layout_of(dense, plan))
    unmark(dense)
    rest = plan.model_copy(
        update={"stacks": tuple(s.model_copy(update={"groups": ()}) for s in plan.stacks if s.gates)}
    )
    if rest.stacks:
        mark(dense, rest)
    return dense


def dropped(model: PreTrainedModel, plan: SharingPlan) -> PreTrainedModel:
    """A copy of ``model`` without the positions that ``plan`` drops."""
    stacks = find_stacks(model)
    for one in plan.stacks:
        if (stack := find(stacks, one.name)).length != one.length:
            raise PlanError(f"stack {one.name!r} has {stack.length} layers, the plan is for {one.length}.")
    student = model
    for one in plan.stacks:
        if one.drop:
            student = drop_layers(student, find(find_stacks(student, [one.name]), one.name), one.drop)
    return copy.deepcopy(model) if student is model else student


@torch.no_grad()
def solve(layout: Layout, weights: Mapping[str, Tensor], grams: Grams) -> dict[str, Tensor]:
    """The values of all shared tensors and factors, by their names after sharing. Pure: tensors in, tensors out."""
    values: dict[str, Tensor] = {}
    for job in layout.jobs:
        values |= _solve_one(
            job, [weights[name] for name in job.names], [grams[m] for m in job.modules if m in grams]
        )
    return values


def _solve_one(job: Job, weights: list[Tensor], grams: list[Tensor]) -> dict[str, Tensor]:
    if job.weight.kind == "conv1d":
        weights = [weight.T for weight in weights]
    group, seen = job.group, grams or None
    owners = [names[0] for names in job.ties]
    if group.method == "basis" and group.side == "input":
        ups, down = lowrank.shared_input(weights, group.rank, seen)
        return {owners[0]: down} | {f"{m}.up": up for m, up in zip(job.modules, ups, strict=True)}
    if group.method == "basis" and group.side == "output":
        up, downs = lowrank.shared_output(weights, group.rank, seen)
        return {owners[0]: up} | {f"{m}.down": down for m, down in zip(job.modules, downs, strict=True)}
    merged = _merge(job, weights, grams)
    if not job.factored:
        return {owners[0]: merged.T if job.weight.kind == "conv1d" else merged}
    if group.method == "basis":
        up, down = lowrank.truncate(merged, group.rank, _gram_of_merged(job, grams))
        return {owners[0]: down, owners[1]: up}
    values = {owners[0]: merged}
    for i, (module, weight) in enumerate(zip(job.modules, weights, strict=True)):
        up, down = lowrank.truncate(weight - merged, group.rank, grams[i] if grams else None)
        values |= {f"{module}.up": up, f"{module}.down": down}
    return values


def _gram_of_merged(job: Job, grams: list[Tensor]) -> Tensor | None:
    """What the merged weight sees: the inputs of the position that gave it, or those of all."""
    if not grams:
        return None
    picked = {"first": 0, "last": -1, "pick": job.source}.get(job.group.merge)
    return grams[picked] if picked is not None else torch.stack(grams).mean(0)


def _merge(job: Job, weights: list[Tensor], grams: list[Tensor]) -> Tensor:
    match job.group.merge:
        case "first":
            return merge.first(weights)
        case "last":
            return merge.last(weights)
        case "pick":
            return weights[job.source].clone()
        case "regmean" if job.weight.kind != "other":
            return merge.regmean(weights, grams)
    return merge.mean(weights)


def _uses_activations(job: Job) -> bool:
    return job.weight.kind != "other" and (job.factored or job.group.merge == "regmean")
