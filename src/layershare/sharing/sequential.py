"""Sequential calibration: each map is fitted on what the already compressed maps before it hand on.

Fitted on the original's activations, every map is right about inputs that it will never see, and errors pile up. Here
maps are solved in the order in which the model computes. With x the inputs in the original and y those in the model
compressed so far, the target of a map is the original's output W x, and the best map for it on y is

    W' = E[W x y^T] E[y y^T]^-1 = W + W E[(x - y) y^T] E[y y^T]^-1

(the least squares of GPTAQ, Li et al., 2025, 2504.02692). Merges and factors are then made of W' in the metric of
E[y y^T], by the same pure functions as without. What a group shares is fitted when its first position is reached, on
what all its positions see at that time; what a position keeps for itself is fitted again when its own turn comes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from layershare.sharing.layout import Job, Layout
from layershare.sharing.moments import Moments
from layershare.sharing.solve import dense_values, refit, rows, solve, solve_one
from layershare.sharing.statistics import Paired, collect_pairs, order_of_calls
from layershare.sharing.tie import fill, install

# Pull towards the original weights where activations are rare, in units of the mean eigenvalue of E[y y^T].
RIDGE = 1e-2


def adapted(weight: Tensor, seen: Paired, ridge: float = RIDGE) -> Tensor:
    """W' (out, in) above, from W (out, in) and the second moments ``seen``; equal to W where x = y."""
    gram = seen.gram.double()
    gram = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * ridge * gram.diagonal().mean()
    step = torch.linalg.solve(gram, seen.shift.double(), left=False)
    return (weight.double() + weight.double() @ step).to(weight.dtype)


class _Turn(NamedTuple):
    """One position of one job."""

    job: Job
    at: int
    """Which of the job's positions."""


@torch.no_grad()
def solve_in_order(
    student: PreTrainedModel,
    original: PreTrainedModel,
    layout: Layout,
    in_original: Callable[[str], str],
    batches: Sequence[Mapping[str, Any]],
    counts: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The values of all shared tensors and factors, as :func:`~layershare.sharing.solve.solve` gives them.

    ``student``: a copy of the ``original`` without the dropped positions, not yet shared. It computes with the
    compressed maps as they come, and is left so: its weights are not the original's any more, and its gates are on.
    ``in_original``: from a name in the student to that in the original. Statistics are kept for one step at a time: the
    maps that see the same tensor. Both models run once for each step, only as far as it.
    """
    weights = dict(original.named_parameters(remove_duplicate=False))
    first = Layout((), layout.gates, tables=layout.tables)
    values: dict[str, Tensor] = {}
    for made in solve(first, weights.__getitem__, Moments(), counts):
        values |= made
    install(student, first)
    fill(student, values)
    jobs = [job for job in layout.jobs if job.weight.kind != "other"]
    for job in layout.jobs:
        if job.weight.kind == "other":  # no map: nothing to fit
            _put(student, job, values, solve_one(job, [weights[in_original(n)] for n in job.sources], []))
    turns = {module: _Turn(job, i) for job in jobs for i, module in enumerate(job.modules)}
    steps = [[turns[name] for name in step] for step in order_of_calls(student, list(turns), batches)]
    for step in tqdm(steps, desc="calibrate", disable=None, leave=False):
        due = [turn for turn in step if turn.at == 0 or (turn.job.private and turn.job.ties[0][0] in values)]
        watched = list(dict.fromkeys(name for turn in due for name in _watched(turn)))
        seen = collect_pairs(original, student, {name: in_original(name) for name in watched}, batches)
        for job, at in due:
            names, modules = (job.sources, job.modules) if at == 0 else ([job.names[at]], [job.modules[at]])
            exact = [weights[in_original(name)] for name in names]
            known = [seen[name] for name in modules if name in seen]
            aims = [adapted(weight, one) for weight, one in zip(rows(job, exact), known, strict=False)]
            grams = [one.gram for one in known]
            if at == 0:
                made = solve_one(job, exact, grams, aims or None)
            else:
                made = refit(job, at, values, aims[0], grams[0])
            _put(student, job, values, made)
    return values


def _watched(turn: _Turn) -> Iterable[str]:
    if not turn.job.uses_activations:
        return ()
    return turn.job.modules if turn.at == 0 else (turn.job.modules[turn.at],)


def _put(student: nn.Module, job: Job, values: dict[str, Tensor], made: Mapping[str, Tensor]) -> None:
    """Keep the values, and let the student compute with them."""
    values |= made
    for name, weight in zip(job.names, dense_values(job, values), strict=True):
        student.get_parameter(name).copy_(weight)
