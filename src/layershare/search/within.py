"""A search inside of another run, and what all searches have in common."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layershare.errors import DependencyError, PlanError
from layershare.plan import SharingPlan
from layershare.result import write_atomic
from layershare.search.beginning import Beginning
from layershare.search.bench import Bench
from layershare.sharing.price import predict
from layershare.sharing.whole import model_bytes
from layershare.stacks import Stack

if TYPE_CHECKING:  # it imports optuna, which is optional
    from layershare.search.study import Trial, Trials

TRIALS = 64


def search_within(
    bench: Bench, budget: float, folder: Path, *, progress: Callable[[str], None], seed: int = 0, trials: int = TRIALS
) -> SharingPlan:  # fmt: skip
    """The best of ``trials`` plans within ``budget``. They are kept in ``folder``: while it goes on, so that the same
    call goes on where it stopped, as a database, and then as ``search.json``."""
    need_optuna()
    from layershare.search.study import lead

    file = folder / "search.db"
    study, made = trials_of(f"sqlite:///{file.absolute()}", "layershare"), Beginning(bench, budget)
    lead(study, trials, made, seed, progress)
    tried = study.finished
    _, plan = best_of(tried, budget)
    rows = [row_of(one, bench.model, made.stacks) for one in tried]
    write_atomic(folder / "search.json", json.dumps({"trials": rows}, indent=1) + "\n")
    file.unlink()
    return plan


def need_optuna() -> None:
    """Raise DependencyError where optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise DependencyError("searching a plan needs optuna.", "pip install 'layershare[search]'") from None


def trials_of(url: str, name: str) -> "Trials":
    """The trials of a search in a storage that may hold others."""
    from layershare.search.study import Trials

    return Trials(url, name)


def name_of(inputs: Mapping[str, Any]) -> str:
    """Another name for other inputs."""
    return f"layershare {hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]}"


def best_of(tried: "Sequence[Trial]", budget: float) -> tuple[float, SharingPlan]:
    """The least change, and its plan; of equals the first. Raises PlanError where no plan was possible."""
    possible = [
        (one.change, one.index, one.plan) for one in tried if one.change is not None and one.plan is not None
    ]
    if not possible:
        raise PlanError(f"budget {budget:g} is out of reach: {tried[-1].says}")
    change, _, plan = min(possible, key=lambda one: one[:2])
    return change, plan


def row_of(one: "Trial", model: Any, stacks: Sequence[Stack]) -> dict[str, Any]:
    """A trial as it is kept: its change, what it stores (a fraction of the layers; bytes of the model), its plan."""
    row = {"index": one.index, "name": one.name, "change": one.change, "says": one.says, "fixed": one.fixed}
    if one.plan is None or one.change is None:
        return row
    size = {"stored": predict(stacks, one.plan).ratio, "bytes": model_bytes(model, one.plan)[1]}
    return row | size | {"plan": one.plan.to_dict()}
