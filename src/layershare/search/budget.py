"""What a budget means: a fraction of the layer parameters, or bytes of the whole model, embedding table included."""

from typing import Any

from layershare.errors import ModelError, PlanError
from layershare.plan import SharingPlan, Table
from layershare.sharing.embedding import main_table, tables_of
from layershare.sharing.price import predict
from layershare.sharing.whole import WIDTHS, model_bytes
from layershare.stacks import find_stacks


def widths(budget: float) -> tuple[float, ...]:
    """The widths of the embedding table to try: only a budget in bytes counts the table."""
    return (1.0,) if budget < 1 else (1.0, *WIDTHS)


def table_at(model: Any, width: float) -> tuple[Table, ...]:
    """The embedding table in two factors, ``width`` of its own; none for 1. Raises ModelError where there is none."""
    if width >= 1:
        return ()
    name = main_table(model)
    columns = tables_of(model, SharingPlan(tables=(Table(name=name, rank=1),)))[0].columns
    return (Table(name=name, rank=max(1, int(width * columns))),)


def most_for_layers(model: Any, budget: float) -> float:
    """As :func:`for_layers`, with the embedding table as narrow as it may become. Raises its PlanError where no width
    leaves anything."""
    refused: PlanError | None = None
    for width in sorted(widths(budget)):
        try:
            return for_layers(model, budget, table_at(model, width))
        except ModelError:  # it has no table that could be factored
            continue
        except PlanError as error:
            refused = refused or error
    raise refused or PlanError(f"budget {budget} leaves nothing for the layers.")


def for_layers(model: Any, budget: float, tables: tuple[Table, ...] = ()) -> float:
    """The fraction of the layer parameters that ``budget`` leaves, at most 1. Raises PlanError where it leaves none."""
    if budget < 1:
        return budget
    layers = predict(find_stacks(model), SharingPlan()).layer_bytes_before
    before, after = model_bytes(model, SharingPlan(tables=tables))
    left = (int(budget) - (after - layers)) / layers
    if left <= 0:
        raise PlanError(
            f"{int(budget):,} bytes are less than the {after - layers:,} of what is not layers, of {before:,} in all."
        )
    return min(left, 1.0)
