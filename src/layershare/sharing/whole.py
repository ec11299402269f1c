"""A budget for the whole model: how much of it goes to the embedding table, how much to the layers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from layershare.errors import ModelError, PlanError
from layershare.plan import SharingPlan, Table
from layershare.sharing.convert import Fit, share
from layershare.sharing.embedding import main_table, tables_of
from layershare.sharing.price import predict
from layershare.sharing.tie import count
from layershare.stacks import find_stacks

# Ranks of the table to try, as fractions of its width, beside the whole table.
WIDTHS = (0.75, 0.625, 0.5, 0.375, 0.25, 0.125)


def model_bytes(model: PreTrainedModel, plan: SharingPlan) -> tuple[int, int]:
    """Bytes of all parameters of ``model``, each counted once: as it is, and as ``plan`` will store it."""
    before, layers = count(model).bytes_unique, predict(find_stacks(model), plan)
    saved = (
        layers.layer_bytes_before - layers.layer_bytes + sum(t.saved_bytes for t in tables_of(model, plan))
    )
    return before, before - saved


def whole_plan(
    model: PreTrainedModel,
    budget: float,
    make: Callable[[float], SharingPlan],
    change: Callable[[PreTrainedModel], float],
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    fit: Fit = "inputs",
) -> SharingPlan:
    """The plan for ``budget`` that changes the output least: each width of the table in turn, the layers get the rest.

    budget: of the whole model, a fraction below 1 or a number of bytes. make: a plan for the layers from a fraction of
    their parameters, as ``lambda b: make_plan(model, "basis", budget=b)``. change: how far a shared model's output is
    from the original's. Each candidate is shared once, as ``calibration`` and ``fit`` say, and not healed.
    Raises PlanError if nothing fits.
    """
    before, _ = model_bytes(model, SharingPlan())
    room = int(budget * before) if budget < 1 else int(budget)
    best: tuple[float, SharingPlan] | None = None
    batches = None if calibration is None else list(calibration)
    for plan in _candidates(model, room, make):
        if model_bytes(model, plan)[1] <= room:
            moved = change(share(model, plan, calibration=batches, fit=fit))
            if best is None or moved < best[0]:
                best = moved, plan
    if best is None:
        raise PlanError(
            f"no plan stores the model in {room:,} bytes of its {before:,}.", "Give a larger budget."
        )
    return best[1]


def _candidates(
    model: PreTrainedModel, room: int, make: Callable[[float], SharingPlan]
) -> Iterable[SharingPlan]:
    layers = predict(find_stacks(model), SharingPlan()).layer_bytes_before
    every: list[tuple[Table, ...]] = [()]
    try:
        name = main_table(model)
    except ModelError:  # no table: all of the budget is for the layers
        pass
    else:
        columns = tables_of(model, SharingPlan(tables=(Table(name=name, rank=1),)))[0].columns
        every += [(Table(name=name, rank=max(1, int(width * columns))),) for width in WIDTHS]
    for tables in every:
        _, after = model_bytes(model, SharingPlan(tables=tables))
        left = (room - (after - layers)) / layers
        if left >= 1:  # the table alone saves enough
            if tables:
                yield SharingPlan(tables=tables)
        elif left > 0:
            try:
                yield make(left).model_copy(update={"tables": tables})
            except PlanError:  # too little is left for the layers
                continue
