"""How a plan is shown: drawn and priced, or as what a search found."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from layershare.cli.answer import Shown, note
from layershare.errors import OptionError


def drawn(stacks: Any, plan: Any, out: Path | None) -> Shown:
    """The plan and what it stores; saved where ``out`` says."""
    from layershare import predict
    from layershare.sharing.price import remarks

    cost, notes = predict(stacks, plan), remarks(stacks, plan)
    if out is not None:
        plan.save(out)
    data = {"plan": plan.to_dict(), "predicted": asdict(cost) | {"ratio": cost.ratio}, "notes": notes}
    text = [*map(str, stacks), "", plan.picture(), *(f"note: {one}" for one in notes), "", price(cost)]
    return Shown("\n".join(text), data)


def price(cost: Any) -> str:
    """What a plan stores, in one line."""
    return (
        f"stores {cost.layer_unique:,} of {cost.layer_effective:,} layer parameters ({cost.ratio:.1%}), "
        f"{cost.layer_bytes / 1e6:,.1f} of {cost.layer_bytes_before / 1e6:,.1f} MB"
    )


def refuse(**options: Any) -> None:
    """Raise OptionError where an option is given that a search has no use for."""
    if given := next((name for name, value in options.items() if value), None):
        raise OptionError(
            f"--{given} does not go with --data, which searches the plan.", "Leave out one of the two."
        )


def searched(model: str, out: Path | None, budget: float | None, data: Any, **options: Any) -> Shown:
    """What a search found, and how to use it."""
    from layershare.search.explain import explain
    from layershare.search.folder import search

    if out is None or budget is None:
        missing = "--out, the folder to write" if out is None else "--budget"
        raise OptionError(f"plan --data needs {missing}.")
    result = search(model, out, budget=budget, data=data, progress=note, **options)
    texts = " ".join(f"--calibration {file}" for file in data[:1])
    share = f"layershare share {model} --plan {out / 'plan.toml'} {texts} --task {result.task} --fit answer -o FOLDER"
    return Shown(
        f"{explain(result)}\n\nSaved in {out}. To use it:\n  {share}", result.model_dump(mode="json")
    )
