"""Sequential calibration: each map is fitted on what the already compressed maps before it hand on.

Fitted on the original's activations, every map is right about inputs that it will never see, and errors pile up. Here
maps are solved in the order in which the model computes. Let y be what a map sees in the model compressed so far, and
``gap`` what its output W y + b lacks there: the original's output less its own, or, where the output is added to a
residual stream, the original's sum less its own, so that errors which passed the map by are made up for as well. The
best affine map is that of least squares,

    W* = W + E[gap y^T] E[y y^T]^-1    (moments about the means; GPTAQ, Li et al., 2025, 2504.02692, without the sum)

of which a part is taken, since it is right about the calibration data alone: W' = W + STEP (W* - W). Merges and factors
are then made of W' by the same pure functions as without, in the metric of E[y y^T] and, where the slopes of the answer
are known, of these. Biases follow at last, so that the mean output is right whatever a matrix has lost. What a group
shares is fitted when its first position is reached, on what all its positions see at that time; what a position keeps
for itself is fitted again when its own turn comes. Maps of the same stacks that the plan leaves whole become W' too:
they cost no byte more, and make up for the others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from layershare.linear import kind_of
from layershare.plan import Group
from layershare.sharing.kv import install_kv
from layershare.sharing.layout import Job, Layout
from layershare.sharing.moments import Moments
from layershare.sharing.pairs import Again, Paired, collect_pairs, readers_of_sums
from layershare.sharing.replay import Replay, replayable
from layershare.sharing.solve import dense_values, refit, rows, solve, solve_one
from layershare.sharing.statistics import Batch, Grams, order_of_calls
from layershare.sharing.tie import fill, install
from layershare.stacks import Stack, find_stacks

# Pull towards the original weights where activations are rare, in units of the mean eigenvalue of E[y y^T].
RIDGE = 1e-2
# How far to go towards the least squares of the calibration data; the whole way is worse on other texts (docs/log.md).
STEP = 0.5


class Aim(NamedTuple):
    """What a map should be, and where."""

    weight: Tensor
    """W' (out, in)."""
    gram: Tensor
    """The metric: moments of y, (in, in); about the mean if there is a bias to take up what the mean loses."""
    seen: Tensor
    """E[y], (in)."""
    output: Tensor
    """The mean that the output should have, (out)."""


def aim_of(
    weight: Tensor, bias: Tensor | None, pair: Paired, *, ridge: float = RIDGE, step: float = STEP
) -> Aim:  # fmt: skip
    """W' and its metric, from W (out, in), b (out) and the moments ``pair``; equal to W where there is no gap."""
    dense, gram, shift = weight.double(), pair.gram.double(), pair.shift.double()
    mean, lift = pair.mean.double(), pair.lift.double()
    output = dense @ mean + lift + (0 if bias is None else bias.double())
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if bias is not None:
        rounding = (
            1e-6 * gram.diagonal().mean() * eye
        )  # what is left of single precision after the difference
        gram, shift = gram - torch.outer(mean, mean) + rounding, shift - torch.outer(lift, mean)
    least = torch.finfo(torch.float32).tiny  # where nothing is ever seen
    away = torch.linalg.solve(gram + ridge * gram.diagonal().mean().clamp_min(least) * eye, shift, left=False)
    return Aim((dense + step * away).to(weight.dtype), gram, mean, output)


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
    slopes: Grams | None = None,
) -> dict[str, Tensor]:
    """The values of all shared tensors, factors and biases, as :func:`~layershare.sharing.solve.solve` gives them.

    ``student``: a copy of the ``original`` without the dropped positions, not yet shared. It computes with the
    compressed maps as they come, and is left so: its weights are not the original's any more, and its gates are on.
    ``in_original``: from a name in the student to that in the original. ``slopes``: of the answer, by names in the
    original. Statistics are kept for one step at a time: the maps that see the same tensor. Both models run once for
    each step, only as far as it, and layers that are settled are not computed again.
    """
    weights = dict(original.named_parameters(remove_duplicate=False))
    jobs = [job for job in layout.jobs if job.weight.kind != "other"]
    planned = {module for job in jobs for module in job.modules}
    named = {job.stack for job in jobs}
    jobs += whole_maps((one for one in find_stacks(student, list(named)) if one.name in named), layout)
    first = Layout((), layout.gates, tables=layout.tables)
    values: dict[str, Tensor] = {}
    for made in solve(first, weights.__getitem__, Moments(), counts):
        values |= made
    install(student, first)
    install_kv(student, layout.lent)  # or maps would be fitted to keys and values that nobody computes
    fill(student, values)
    for job in layout.jobs:
        if job.weight.kind == "other":  # no map: nothing to fit
            _put(student, job, values, solve_one(job, [weights[in_original(n)] for n in job.sources], []))
    shared = {name for job in layout.jobs for name in job.names}
    turns = {module: _Turn(job, i) for job in jobs for i, module in enumerate(job.modules)}
    known = slopes or {}
    calls = order_of_calls(student, list(turns), batches, needed=planned)
    steps = [[turns[name] for name in step] for step in calls]
    sums = {
        name: (reader, in_original(reader))
        for name, reader in readers_of_sums(student, list(turns), batches[0]).items()
    }
    again = _replays(student, original, layout, in_original, batches[0])
    for number, step in enumerate(tqdm(steps, desc="calibrate", disable=None, leave=False)):
        due = [turn for turn in step if turn.at == 0 or (turn.job.private and turn.job.ties[0][0] in values)]
        watched = list(dict.fromkeys(name for turn in due for name in _watched(turn)))
        pairs = collect_pairs(
            original,
            student,
            {name: in_original(name) for name in watched},
            batches,
            sums,
            again(steps[number:]),
            needed=planned,
        )
        for job, at in due:
            if not planned & set(job.modules) and job.modules[0] not in pairs:
                continue  # no token came: an expert whom nobody asks any more
            names, modules = (job.sources, job.modules) if at == 0 else ([job.names[at]], [job.modules[at]])
            exact = [weights[in_original(name)] for name in names]
            aims = [
                _aim(student, original, module, in_original(module), weight, pairs[module], shared)
                for module, weight in zip(modules, rows(job, exact), strict=False) if module in pairs
            ]  # fmt: skip
            steep = [known[in_original(m)] for m in modules if in_original(m) in known]
            if at == 0:
                made = solve_one(
                    job, exact, [aim.gram for aim in aims], [aim.weight for aim in aims] or None, steep
                )
            else:
                made = refit(job, at, values, aims[0].weight, aims[0].gram, *steep)
            _put(student, job, values, made)
            for module, aim in zip(modules, aims, strict=False):
                if in_original(name := f"{module}.bias") in weights and name not in shared:
                    bias = aim.output - _rows(student, module).double() @ aim.seen
                    values[name] = bias.to(student.get_parameter(name).dtype)
                    student.get_parameter(name).copy_(values[name])
    return values


def whole_maps(stacks: Iterable[Stack], layout: Layout) -> list[Job]:
    """A job for each map that ``layout`` leaves whole. The regression mean of one map is what it should be, W'."""
    taken = {name for job in layout.jobs for name in job.names}
    return [
        Job(stack.name, Group(positions=(i,), parts=(weight.name,), merge="regmean"), weight, (i,))
        for stack in stacks
        for i, layer in enumerate(stack.layers)
        for weight in layer
        if weight.factorable and f"{stack.name}.{i}.{weight.name}" not in taken
    ]


def _replays(
    student: nn.Module, original: nn.Module, layout: Layout, in_original: Callable[[str], str], batch: Batch
) -> Callable[[Sequence[Sequence[_Turn]]], Again | None]:
    """From the steps that are left to what the two models need not compute again; None where it cannot be done."""
    if layout.lent:  # who lends has to compute
        return lambda _: None
    stacks = list(dict.fromkeys(job.stack for job in layout.jobs))
    lengths = {stack: len(list(student.get_submodule(stack).children())) for stack in stacks}
    if not (replayable(student, stacks, batch) and replayable(original, stacks, batch)):
        return lambda _: None
    before, after = Replay(original), Replay(student)

    def again(left: Sequence[Sequence[_Turn]]) -> Again:
        ours = lengths.copy()
        for job, at in (turn for step in left for turn in step):
            ours[job.stack] = min(ours[job.stack], job.layers[at])
        theirs = {
            stack: int(in_original(f"{stack}.{count - 1}").rpartition(".")[2]) + 1 if count else 0
            for stack, count in ours.items()
        }
        return lambda number: (before.run(number, theirs), after.run(number, ours))

    return again


def _aim(
    student: nn.Module, original: nn.Module, module: str, old: str, weight: Tensor, pair: Paired, shared: set[str]
) -> Aim:  # fmt: skip
    """What ``module`` should be. ``weight`` (out, in): the original's; the gap is what the present one leaves. A bias
    that is ``shared`` takes nothing up: the matrix alone has to."""
    bias = None if f"{module}.bias" in shared else getattr(original.get_submodule(old), "bias", None)
    more = (_rows(student, module) - weight).float()
    shift, lift = pair.shift + more @ pair.gram, pair.lift + more @ pair.mean
    if bias is not None:
        extra = (student.get_parameter(f"{module}.bias") - bias).float()
        shift, lift = shift + torch.outer(extra, pair.mean), lift + extra
    return aim_of(weight, bias, pair._replace(shift=shift, lift=lift))


def _rows(student: nn.Module, module: str) -> Tensor:
    """The weight (out, in) that the student has there now."""
    weight = student.get_parameter(f"{module}.weight")
    return weight.T if kind_of(student.get_submodule(module)) == "conv1d" else weight


def _watched(turn: _Turn) -> Iterable[str]:
    if not turn.job.uses_activations:
        return ()
    return turn.job.modules if turn.at == 0 else (turn.job.modules[turn.at],)


def _put(student: nn.Module, job: Job, values: dict[str, Tensor], made: Mapping[str, Tensor]) -> None:
    """Keep the values, and let the student compute with them."""
    values |= made
    for name, weight in zip(job.names, dense_values(job, values), strict=True):
        student.get_parameter(name).copy_(weight)
