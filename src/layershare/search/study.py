"""Trials in an optuna storage: any number of processes take them, and the same seed finds the same plan.

Trials come in generations. Those of a generation are suggested from the results of the earlier ones alone, so it makes
no difference who runs them, how many at a time, and in which order they end. The process that leads adds a generation
when the one before is done; workers claim waiting trials, one at a time. A trial whose process is gone is added again.
"""

import functools
import itertools
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from layershare.errors import DependencyError, ModelError, PlanError, StoreError
from layershare.plan import SharingPlan
from layershare.search.beginning import Beginning, Entry, entry
from layershare.search.space import Near, Space, Suggest, as_parameters, suggest

GENERATION = 8
"""Trials suggested from the same results: so many processes can be busy at once."""
BEAT = 30
"""Seconds between the signs of life that a process gives while it runs a trial."""
FIRST_STEP, FADING = 0.2, 30
"""How far a point moves at first, as a part of each range, and after how many trials half as far."""
WAIT = 0.2
"""Seconds until a process without work looks again."""
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
PACKAGES = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Driver of a database -> the package that brings it, where the names differ."""

Measure = Callable[[SharingPlan], float]


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    index: int
    name: str
    change: float | None
    """None: refused."""
    plan: SharingPlan | None
    says: str
    """What is special about it, or why it was refused."""
    fixed: bool
    """A preset or ``auto``: not a point of the space."""

    def __str__(self) -> str:
        figure = "not possible" if self.change is None else f"{self.change:.4g}"
        return f"trial {self.index}: {figure}  {': '.join(filter(None, (self.name, self.says)))}"


class Trials:
    """A study in a storage."""

    def __init__(self, storage: str, name: str) -> None:
        """Open the study of this name, new or old. ``storage``: a URL as SQLAlchemy takes them.

        Raises StoreError where the database cannot be opened, DependencyError where its driver is missing.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the heartbeat
        patience: dict[str, Any] = {"connect_args": {"timeout": 100}} if storage.startswith("sqlite:") else {}
        try:
            self.storage = optuna.storages.RDBStorage(
                storage, engine_kwargs=patience, heartbeat_interval=BEAT, grace_period=4 * BEAT
            )
            self.study = optuna.create_study(storage=self.storage, study_name=name, load_if_exists=True)
        except ImportError as error:
            cause = error.__cause__ or error  # optuna wraps it
            missing = getattr(cause, "name", None)
            raise DependencyError(
                f"the storage {without_password(storage)} needs a driver ({cause}).",
                f"pip install {PACKAGES.get(missing, missing)}" if missing else "",
            ) from None
        except Exception as error:  # whatever the driver of the database raises
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise StoreError(
                f"the storage {without_password(storage)} cannot be opened ({reason.replace(storage, '...')}).",
                "Give the URL of a database that optuna speaks, as sqlite:///FILE or postgresql://HOST/NAME.",
            ) from None

    @property
    def by_index(self) -> dict[int, FrozenTrial]:
        """The trial that counts for each index: one that is done, or else the first that waits or runs."""
        found: dict[int, FrozenTrial] = {}
        for one in self.study.get_trials(deepcopy=False):
            index = one.user_attrs.get("index")
            if index is None or one.state == TrialState.FAIL:
                continue
            if index not in found or (one.state in DONE and found[index].state not in DONE):
                found[index] = one
        return dict(sorted(found.items()))

    @property
    def finished(self) -> list[Trial]:
        """All finished trials, in the order of their index."""
        return [_trial(one) for one in self.by_index.values() if one.state in DONE]


def without_password(url: str) -> str:
    """``url`` as it may be shown."""
    scheme, slashes, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{slashes}{user.partition(':')[0]}:***@{host}" if at and ":" in user else url


def lead(trials: Trials, number: int, made: Beginning, seed: int, say: Callable[[str], None]) -> None:
    """Run trials, with all processes that follow, until ``number`` are finished, or the first generation, if that is
    larger. ``made`` knows the first generation, and makes plans of choices."""
    told = {one.index for one in trials.finished}
    if told:
        say(f"go on: {len(told)} trials are finished")
    while True:
        _fail_lost(trials)
        known = trials.by_index
        if not (wanted := _next_generation(known, number)):
            return
        if any(index not in known for index in wanted):
            entries = _suggested(trials, wanted, made, seed) if wanted[0] else made.entries()
            for index, one in enumerate(entries, wanted[0]):
                if index not in known:
                    trials.study.add_trial(_waiting(index, one, made.space, len(entries)))
        if not work(trials, made.bench):
            time.sleep(WAIT)  # others are at it
        for trial in trials.finished:
            if trial.index not in told:
                told.add(trial.index)
                say(str(trial))


def follow(trials: Trials, measure: Measure, go_on: Callable[[], bool]) -> None:
    """Run the trials that another process adds, while ``go_on`` says so."""
    while go_on():
        if not work(trials, measure):
            time.sleep(WAIT)


def work(trials: Trials, measure: Measure) -> bool:
    """Claim a waiting trial and run it; False where there is none."""
    for one in trials.by_index.values():
        if one.state == TrialState.WAITING and _claim(trials, one):
            with _beating(trials, one):
                try:
                    _run(trials, one, measure)
                except BaseException:  # Ctrl-C, or no memory: it is to be run again
                    trials.study.tell(one.number, state=TrialState.FAIL)
                    raise
            return True
    return False


def _run(trials: Trials, one: FrozenTrial, measure: Measure) -> None:
    plan = SharingPlan.from_dict(json.loads(one.user_attrs["plan"]))
    try:
        moved = measure(plan)
    except (PlanError, ModelError) as error:  # it does not fit the model after all
        trials.storage.set_trial_user_attr(one._trial_id, "refused", error.message)
        trials.study.tell(one.number, state=TrialState.PRUNED)
    else:
        trials.study.tell(one.number, moved)


def _claim(trials: Trials, one: FrozenTrial) -> bool:
    """Whether the trial is ours now: no other process can get it."""
    try:
        if not trials.storage.set_trial_state_values(one._trial_id, TrialState.RUNNING):
            return False
    except RuntimeError:  # another one was faster, and has finished it
        return False
    trials.storage.set_trial_user_attr(one._trial_id, "worker", [socket.gethostname(), os.getpid()])
    return True


@contextmanager
def _beating(trials: Trials, one: FrozenTrial) -> Iterator[None]:
    """Signs of life while the block runs, so that others see when this machine is gone."""
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            trials.storage.record_heartbeat(one._trial_id)
            over.wait(BEAT)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _fail_lost(trials: Trials) -> None:
    """Give up trials whose process is gone: of this machine at once, of others when no sign of life came for long."""
    optuna.storages.fail_stale_trials(trials.study)
    for one in trials.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, process = one.user_attrs.get("worker", (None, None))
        if host == socket.gethostname() and not _alive(process):
            trials.study.tell(one.number, state=TrialState.FAIL)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _next_generation(known: Mapping[int, FrozenTrial], number: int) -> range:
    """The indices of the first generation that is not done; none where all are."""
    first = next((one.user_attrs["first"] for one in known.values()), 1)
    last = max(number, first)
    bounds = [0, *range(first, last, GENERATION), last]
    for start, stop in itertools.pairwise(bounds):
        if any(index not in known or known[index].state not in DONE for index in range(start, stop)):
            return range(start, stop)
    return range(0)


def _suggested(trials: Trials, wanted: range, made: Beginning, seed: int) -> list[Entry]:
    """The trials of a generation, from what is known of earlier ones.

    In turns optuna's sampler looks for other regions (a study of its own, in memory, is asked), and the best point so
    far is moved a little, less in later generations: few trials suffice for a hill, too few for a map.
    """
    sampler = optuna.samplers.TPESampler(
        seed=seed * 10_007 + wanted[0], n_startup_trials=1, multivariate=True, constant_liar=True
    )
    shadow = optuna.create_study(sampler=sampler)
    past = [one for index, one in trials.by_index.items() if index < wanted[0] and one.params]
    for one in past:
        shadow.add_trial(
            create_trial(state=one.state, value=one.value, params=one.params, distributions=one.distributions)
        )
    done = [one for one in past if one.value is not None]
    best = min(done, key=lambda one: (one.value, one.user_attrs["index"]), default=None)
    choices = []
    for index in wanted:
        step = FIRST_STEP / (1 + wanted[0] / FADING)
        near = Near(best.params, Random(f"{seed} {index}"), step) if best is not None and index % 2 else None
        asked: Suggest = near or shadow.ask()
        choices.append(suggest(made.space, asked))
    return [entry("", functools.partial(made.propose, choice), choice) for choice in choices]


def _waiting(index: int, one: Entry, space: Space, first: int) -> FrozenTrial:
    """A trial to be claimed, or one that is done because it was refused."""
    told = {"index": index, "name": one.name, "says": str(one.choice or ""), "first": first}
    told |= {"fixed": one.choice is None}
    told |= {"refused": one.refused} if one.plan is None else {"plan": json.dumps(one.plan.to_dict())}
    asked = _Asked()
    if one.choice is not None:
        suggest(space, asked)
    return create_trial(
        state=TrialState.PRUNED if one.plan is None else TrialState.WAITING,
        params={} if one.choice is None else as_parameters(one.choice),
        distributions=asked.distributions, user_attrs=told,
    )  # fmt: skip


class _Asked:
    """Notes what is asked for."""

    def __init__(self) -> None:
        self.distributions: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.distributions[name] = optuna.distributions.IntDistribution(low, high)
        return low

    def suggest_float(self, name: str, low: float, high: float) -> float:
        self.distributions[name] = optuna.distributions.FloatDistribution(low, high)
        return low

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.distributions[name] = optuna.distributions.CategoricalDistribution(choices)
        return choices[0]


def _trial(one: FrozenTrial) -> Trial:
    told = one.user_attrs
    plan = SharingPlan.from_dict(json.loads(told["plan"])) if "plan" in told else None
    return Trial(
        told["index"], told["name"], one.value, plan, told.get("refused") or told["says"], told["fixed"]
    )
