"""Factors of any rank from one decomposition: a trial costs no SVD that another trial has paid for.

The factors of rank r are the first r of all, for every method that an SVD solves; so each is solved once, at full rank.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layershare.sharing.layout import Job
from layershare.sharing.lowrank import balanced
from layershare.sharing.moments import Moments
from layershare.sharing.solve import pivoted, solve_one
from layershare.sharing.statistics import Grams

KEPT = 4.0
"""How many times the parameters of the layers are kept in decompositions, at most."""


class Fitted:
    """The values of jobs on one model, fitted to its answer by ``moments``."""

    def __init__(self, model: PreTrainedModel, moments: Moments) -> None:
        self.moments = moments
        self._weights: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._room = KEPT * sum(weight.numel() for weight in self._weights.values())
        self._solved: OrderedDict[tuple, dict[str, Tensor]] = OrderedDict()

    @torch.no_grad()
    def values(self, job: Job, original: Callable[[str], str]) -> dict[str, Tensor]:
        """What :func:`~layershare.sharing.solve.solve_one` gives, up to rounding. ``original``: from names in the
        student to names in the model."""
        if (
            not job.factored
            or job.group.method == "atoms"
            or job.group.fit == "geopair"
            or job.group.diagonal
        ):
            return self._solve(job, original)
        full = self._full(job, original)
        rank = job.group.rank
        cut = {
            name: value[:, :rank] if name.endswith(".up") else value[:rank] if name.endswith(".down") else value
            for name, value in full.items()
        }  # fmt: skip
        return pivoted(job, cut | _balanced(cut), _of(job, original, self.moments.inputs))

    @torch.no_grad()
    def energies(self, job: Job) -> Tensor:
        """What each further rank of a job on the original's names carries of the answer's change, float64.

        Component k of position l carries (up_k^T T_l up_k) (down_k G_l down_k^T); of one matrix these are its squared
        singular values in the metric of the answer.
        """
        full = self._full(job, str)
        owner = {member: names[0] for names in job.ties for member in names}
        total = torch.zeros(self._most(job), dtype=torch.float64)
        for module in job.modules:
            up, down = (
                full[owner.get(f"{module}.{leaf}", f"{module}.{leaf}")].double() for leaf in ("up", "down")
            )
            gram, slope = (moments[module].double() for moments in self.moments)
            total += (((slope @ up) * up).sum(0) * ((down @ gram) * down).sum(1)).cpu()
        return total.flip(0).cummax(0).values.flip(0)  # what comes later is never worth more

    def _full(self, job: Job, original: Callable[[str], str]) -> dict[str, Tensor]:
        group = job.group
        key = (tuple(map(original, job.sources)), group.method, group.side, group.merge, job.source)
        if key not in self._solved:
            whole = replace(job, group=group.model_copy(update={"rank": self._most(job), "pivots": False}))
            self._solved[key] = {
                _relative(name, job): value for name, value in self._solve(whole, original).items()
            }
        self._solved.move_to_end(key)
        while len(self._solved) > 1 and self._size() > self._room:
            self._solved.popitem(last=False)
        return {_absolute(name, job): value for name, value in self._solved[key].items()}

    def _size(self) -> int:
        return sum(value.numel() for values in self._solved.values() for value in values.values())

    def _solve(self, job: Job, original: Callable[[str], str]) -> dict[str, Tensor]:
        weights = [self._weights[original(name)] for name in job.sources]
        seen, steep = (_of(job, original, known) for known in self.moments)
        return solve_one(job, weights, seen, slopes=steep)

    def _most(self, job: Job) -> int:
        rows, columns = job.weight.shape
        out_features, in_features = (columns, rows) if job.weight.kind == "conv1d" else (rows, columns)
        if job.group.method == "basis" and job.group.side == "input":
            return min(len(job.layers) * out_features, in_features)
        if job.group.method == "basis" and job.group.side == "output":
            return min(out_features, len(job.layers) * in_features)
        return min(out_features, in_features)


def _of(job: Job, original: Callable[[str], str], known: Grams) -> list[Tensor]:
    """The moments of the job's modules."""
    names = [original(name) for name in job.modules]
    return [known[name] for name in names if name in known]


def _relative(name: str, job: Job) -> str:
    """Names with the number of the module among the job's: a position has another name where others were dropped."""
    module, _, leaf = name.rpartition(".")
    return f"{job.modules.index(module)}.{leaf}"


def _absolute(name: str, job: Job) -> str:
    number, _, leaf = name.partition(".")
    return f"{job.modules[int(number)]}.{leaf}"


def _balanced(cut: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors with equal root mean squares, as :mod:`layershare.sharing.lowrank` leaves them."""
    ups, downs = ([name for name in cut if name.endswith(leaf)] for leaf in (".up", ".down"))
    if len(ups) == len(downs):  # both are of one position, or one pair serves all
        pairs: Sequence[tuple[list[str], list[str]]] = [
            ([up], [down]) for up, down in zip(ups, downs, strict=True)
        ]
    else:
        pairs = [(ups, downs)]
    made: dict[str, Tensor] = {}
    for left, right in pairs:
        up = torch.cat([cut[name] for name in left])
        down = torch.cat([cut[name] for name in right], dim=1)
        up, down = balanced(up, down)
        made |= dict(zip(left, up.split([len(cut[name]) for name in left]), strict=True))
        widths = [cut[name].shape[1] for name in right]
        made |= dict(zip(right, down.split(widths, dim=1), strict=True))
    return made
