"""share and unshare: from a model and a plan to a shared model, and back."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from layershare.errors import ModelError, PlanError
from layershare.plan import SharingPlan
from layershare.sharing.carry import mark, plan_of, unmark
from layershare.sharing.depth import drop_layers, sketch
from layershare.sharing.embedding import count_tokens
from layershare.sharing.layout import Layout, find
from layershare.sharing.moments import Moments, measure
from layershare.sharing.sequential import solve_in_order
from layershare.sharing.solve import solve
from layershare.sharing.statistics import collect, texts_in
from layershare.sharing.tie import fill, install, layout_of, tie, undo, verify
from layershare.stacks import find_stacks

Fit = Literal["inputs", "answer", "sequential"]


def share(
    model: PreTrainedModel, plan: SharingPlan, *,
    calibration: Iterable[Mapping[str, Any]] | Moments | None = None, fit: Fit = "inputs",
    known: Moments | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A new model that shares parameters as ``plan`` says; ``model`` is untouched.

    ``calibration``: batches for ``model(**batch)``. With it, low-rank corrections and bases are fitted where the
    activations are (whitened), and the merge ``regmean`` becomes possible; without it the weights alone decide.
    ``fit="answer"``: factors are fitted to the model's answer instead of to each map's own output, which costs a
    backward pass over the batches and loses much less (:mod:`~layershare.sharing.sensitivity`). ``calibration`` may
    also be the :class:`~layershare.sharing.moments.Moments` measured before; these say by themselves what to fit.
    ``fit="sequential"``: as ``answer``, but each map in its turn, on the activations of the model compressed so far
    and with the original's outputs as targets (:mod:`~layershare.sharing.sequential`). It loses least and is slower,
    since both models run once for each step.
    ``known``: moments of this model measured before, beside batches; what ``fit`` has no use for is not used.
    Raises :class:`~layershare.errors.PlanError` if the plan does not fit, or needs a calibration that is not given.
    """
    if fit != "inputs" and (calibration is None or isinstance(calibration, Moments)):
        raise PlanError(
            f"fit = {fit!r} needs activations.", "Give calibration batches; Moments say it themselves."
        )
    student, layout = begin(model, plan, calibrated=calibration is not None)
    known = calibration if isinstance(calibration, Moments) else known
    batches = [] if calibration is None or isinstance(calibration, Moments) else list(calibration)
    counts = {job.modules[0]: count_tokens(model, job, batches) for job in layout.tables if batches}
    wanted = [module for job in layout.jobs if job.uses_activations for module in job.modules]
    if fit == "sequential" and wanted:
        known = known or measure(model, batches, modules=[in_original(model, plan)(name) for name in wanted])
        values = solve_in_order(
            student, model, layout, in_original(model, plan), batches, counts, known.slopes
        )
        finish(student, layout, plan, whitened=True, fit=fit, texts=texts_in(batches))
        fill(student, values)
        return student
    moments = Moments()
    if calibration is not None and wanted:
        if batches and known and fit == "inputs":
            known = Moments(known.inputs)
        moments = _statistics(model, plan, sorted(set(wanted)), known or batches, fit)
    weights: dict[str, Tensor] = dict(student.named_parameters(remove_duplicate=False))
    # What a group lends to another one must outlive its own merge, which is written in place.
    weights |= {name: weights[name].clone() for job in layout.jobs for name in job.sources[len(job.names) :]}
    made: dict[str, Any] = {"whitened": bool(moments.inputs)}
    made |= ({"fit": "answer"} if moments.slopes else {}) | ({"texts": texts_in(batches)} if batches else {})
    finish(student, layout, plan, **made)
    for solved in solve(layout, weights.__getitem__, moments, counts):
        fill(student, solved)
    return student


def begin(model: PreTrainedModel, plan: SharingPlan, *, calibrated: bool) -> tuple[PreTrainedModel, Layout]:
    """A copy of ``model`` without the positions that are dropped, and what is to be done to it. Raises as ``share``."""
    if plan_of(model) is not None:
        raise PlanError(f"{type(model).__name__} is shared already.", "Call layershare.unshare(model) first.")
    student = dropped(model, plan)
    layout = layout_of(student, plan)
    _refuse_idle(plan, layout)
    if not calibrated and (needy := next((job for job in layout.jobs if job.group.merge == "regmean"), None)):
        raise PlanError(
            f"merge 'regmean' of {needy.names[0]} needs activations.", "Give calibration batches."
        )
    return student, layout


def finish(student: PreTrainedModel, layout: Layout, plan: SharingPlan, **made: Any) -> None:
    """Give the student its factored modules, gates, ties and plan; the values of shared tensors come after.

    ``made`` is written beside the plan: how the values were fitted.
    """
    install(student, layout)
    tie(student, layout)
    verify(student, plan)
    if layout.changes:  # a model that only lost positions is an ordinary one
        mark(student, plan, made=made)


def _statistics(
    model: PreTrainedModel,
    plan: SharingPlan,
    modules: Sequence[str],
    calibration: Moments | list[Mapping[str, Any]],
    fit: Fit,
) -> Moments:
    """Of the student's ``modules``, in the original (measured: better than in a model with positions dropped)."""
    original = {name: in_original(model, plan)(name) for name in modules}
    if isinstance(calibration, Moments):
        known = calibration
    elif fit == "answer":
        known = measure(model, calibration, modules=list(original.values()))
    else:
        known = Moments(collect(model, original.values(), calibration))
    if not set(original.values()) <= known.inputs.keys():
        raise PlanError("the moments are not those of this model and plan.", "Measure them on this model.")
    return Moments(*({name: kind[old] for name, old in original.items() if old in kind} for kind in known))


def in_original(model: PreTrainedModel, plan: SharingPlan) -> Callable[[str], str]:
    """A function from the name of a module or tensor after dropping to its name in ``model``."""
    stacks = find_stacks(model, [one.name for one in plan.stacks])
    kept = {find(stacks, one.name).name: one.kept for one in plan.stacks}

    def original(name: str) -> str:
        stack = next((stack for stack in kept if name.startswith(f"{stack}.")), None)
        if stack is None:
            return name
        layer, _, rest = name[len(stack) + 1 :].partition(".")
        return f"{stack}.{kept[stack][int(layer)]}{'.' * bool(rest)}{rest}"

    return original


def _refuse_idle(plan: SharingPlan, layout: Layout) -> None:
    """A plan whose groups name positions that have nothing in common is a mistake, not an ordinary model."""
    groups = [group for one in plan.stacks for group in one.groups if len(group.positions) > 1]
    if groups and not layout.jobs:
        raise PlanError(
            f"the plan shares nothing: {layout.notes[0]}." if layout.notes else "the plan shares nothing."
        )


def unshare(model: PreTrainedModel) -> PreTrainedModel:
    """A new model with the same function in which every position has weights of its own.

    Raises ModelError where positions read keys and values from another one: no ordinary model does.
    Dropped positions stay dropped. Gates have no place in the original architecture: a model with gates keeps them,
    and a plan that says so; without gates the result is a plain model that needs no layershare to load.
    """
    dense = copy.deepcopy(model)
    plan = plan_of(dense)
    if plan is None:
        return dense
    layout = layout_of(dense, plan)
    if layout.lent:
        raise ModelError(
            f"{layout.lent[0][1]} gives what {layout.lent[0][0]} gave (kv = true): no ordinary model does that.",
            "Use the model as it is; export --format onnx keeps it.",
        )
    undo(dense, layout)
    unmark(dense)
    rest = plan.model_copy(
        update={
            "stacks": tuple(s.model_copy(update={"groups": ()}) for s in plan.stacks if s.gates),
            "tables": (),
        }
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


def can_drop(model: PreTrainedModel, plan: SharingPlan) -> bool:
    """Whether ``model`` can do without the positions that ``plan`` drops; tried on names and shapes alone."""
    try:
        dropped(sketch(model), plan)
    except (ModelError, PlanError):
        return False
    return True
