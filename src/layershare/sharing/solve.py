"""From original weights to shared tensors and factors: the method of each job, on tensors alone.

``weights`` are as the model stores them; everything else here speaks of rows (out, in), whatever the module.
``grams``: E[x x^T] of each position's inputs, ``slopes``: moments of the answer's gradients; empty without calibration.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from layershare.linear import ORDER, unpivoted
from layershare.sharing import lowrank, merge
from layershare.sharing.embedding import solve_table
from layershare.sharing.layout import Job, Layout
from layershare.sharing.moments import Moments


@torch.no_grad()
def solve(
    layout: Layout,
    read: Callable[[str], Tensor],
    moments: Moments,
    counts: Mapping[str, Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The values of all shared tensors and factors, by their names after sharing, one parameter of a group at a time.

    ``read`` gives the original parameter of a name. ``counts``: how often tokens are seen, by name of the table's
    module. Pure: tensors in, tensors out.
    """
    for table in layout.tables:
        yield solve_table(table, read, (counts or {}).get(table.modules[0]))
    for job in layout.jobs:
        seen, steep = ([known[m] for m in job.modules if m in known] for known in moments)
        yield solve_one(job, [read(name) for name in job.sources], seen, slopes=steep)


def rows(job: Job, weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights as (out, in)."""
    return [weight.T if job.weight.kind == "conv1d" else weight for weight in weights]


def solve_one(
    job: Job,
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    aims: Sequence[Tensor] | None = None,
    slopes: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """The values of one job, by name. ``weights``: those of ``job.sources``.

    ``aims``: the maps (out, in) to approximate at each position, if they are not the weights: see ``sequential``.
    Merges that choose or average weights take the weights; ``regmean`` and all factors take the aims. ``slopes``: of
    the answer at each position's output; factors found by an SVD are then fitted to the answer.
    """
    given = rows(job, weights)
    aims = given[: len(job.layers)] if aims is None else list(aims)
    group, seen = job.group, list(grams) or None
    owners = [names[0] for names in job.ties]
    if group.method == "basis" and group.side == "input":
        if group.fit == "geopair":
            ups, down = lowrank.geopair(aims, group.rank, seen)
        else:
            ups, down = lowrank.shared_input(aims, group.rank, seen, slopes)
        made = {owners[0]: down} | {f"{m}.up": up for m, up in zip(job.modules, ups, strict=True)}
        return pivoted(job, made, grams)
    if group.method == "basis" and group.side == "output":
        up, downs = lowrank.shared_output(aims, group.rank, seen, slopes)
        return {owners[0]: up} | {f"{m}.down": down for m, down in zip(job.modules, downs, strict=True)}
    if group.method == "atoms":
        atoms, mixes = lowrank.atoms(aims, group.atoms, seen, slopes)
        return {owners[0]: atoms.flatten(0, 1)} | {
            f"{m}.mix": mix for m, mix in zip(job.modules, mixes, strict=True)
        }
    merged = _merge(job, given, aims, grams)
    if not job.factored:
        return {owners[0]: merged.T if job.weight.kind == "conv1d" else merged}
    if group.method == "basis":
        up, down = lowrank.truncate(merged, group.rank, _of_merged(job, grams), _of_merged(job, slopes))
        return {owners[0]: down, owners[1]: up}
    values = {owners[0]: merged}
    for i, (module, aim) in enumerate(zip(job.modules, aims, strict=True)):
        values |= _correction(
            job, module, aim - merged, seen[i] if seen else None, slopes[i] if slopes else None
        )
    return values


def pivoted(job: Job, values: dict[str, Tensor], grams: Sequence[Tensor]) -> dict[str, Tensor]:
    """``values`` (up and down) as a job with pivots stores them; of any other job as they are."""
    if not job.group.pivots:
        return values
    leaves = [f"{job.modules[0]}.{leaf}" for leaf in ("up", "down", ORDER)]
    made = lowrank.pivoted(values[leaves[0]], values[leaves[1]], grams[0] if grams else None)
    return dict(zip(leaves, made, strict=True))


def _correction(
    job: Job, module: str, rest: Tensor, gram: Tensor | None, slope: Tensor | None = None
) -> dict[str, Tensor]:
    """The private correction of one position, of ``rest`` = W - base (out, in)."""
    if job.group.diagonal:
        made = lowrank.with_diagonal(rest, job.group.rank, gram)
        return {f"{module}.{leaf}": one for leaf, one in zip(("up", "down", "diagonal"), made, strict=True)}
    up, down = lowrank.truncate(rest, job.group.rank, gram, slope)
    return {f"{module}.up": up, f"{module}.down": down}


def refit(
    job: Job, index: int, values: Mapping[str, Tensor], aim: Tensor, gram: Tensor, slope: Tensor | None = None
) -> dict[str, Tensor]:
    """The private factors of one position, to approximate ``aim`` (out, in) on inputs with the second moment ``gram``.

    What is shared stays as it is in ``values``.
    """
    module, shared = job.modules[index], {names[0].rpartition(".")[2]: values[names[0]] for names in job.ties}
    if "atoms" in shared:
        return {f"{module}.mix": lowrank.fit_mix(aim, shared["atoms"].view(-1, *aim.shape), gram)}
    if "base" in shared:
        return _correction(job, module, aim - shared["base"], gram, slope)
    if "down" in shared:
        return {f"{module}.up": lowrank.fit_up(aim, shared["down"], gram)}
    return {f"{module}.down": lowrank.fit_down(aim, shared["up"], slope)}


def dense_values(job: Job, values: Mapping[str, Tensor]) -> list[Tensor]:
    """What each position of the job computes with, as the model stores weights."""
    owner = {member: names[0] for names in job.ties for member in names}

    def get(module: str, leaf: str) -> Tensor | None:
        name = f"{module}.{leaf}"
        return values.get(owner.get(name, name))

    if not job.factored:
        return [values[job.ties[0][0]]] * len(job.layers)
    made = []
    for module in job.modules:
        if (atoms := get(module, "atoms")) is not None:
            mix = get(module, "mix")
            assert mix is not None
            made.append(torch.einsum("s,soi->oi", mix, atoms.unflatten(0, (len(mix), -1))))
            continue
        up, down, base, diagonal = (get(module, leaf) for leaf in ("up", "down", "base", "diagonal"))
        assert up is not None
        assert down is not None
        if (order := get(module, ORDER)) is not None:
            made.append(unpivoted(up, down, order))
            continue
        dense = up @ down if base is None else base + up @ down
        made.append(dense if diagonal is None else torch.diagonal_scatter(dense, dense.diagonal() + diagonal))
    return rows(job, made)


def _of_merged(job: Job, moments: Sequence[Tensor]) -> Tensor | None:
    """The moments for the merged weight: those of the position that gave it, or the mean of all."""
    if not moments:
        return None
    picked = {"first": 0, "last": -1, "pick": job.source}.get(job.group.merge)
    return (
        moments[picked]
        if picked is not None and picked < len(moments)
        else torch.stack(list(moments)).mean(0)
    )


def _merge(job: Job, weights: Sequence[Tensor], aims: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    own = weights[: len(job.layers)]
    match job.group.merge:
        case "first":
            return merge.first(own)
        case "last":
            return merge.last(own)
        case "pick":
            return weights[job.source].clone()
        case "regmean" if job.weight.kind != "other":
            return merge.regmean(aims, grams)
    return merge.mean(own)
