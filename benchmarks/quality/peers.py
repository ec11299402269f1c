"""layershare's automatic plan, and what a user could do instead: functions from a subject and a budget to a model.

Nothing stores more than the budget, a fraction of the layer parameters (norms and biases count), except for
``more_layers``, which is layer drop's next size.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

import layershare
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing.lowrank import balanced, fit_up
from layershare.sharing.make import drop_to, spread
from layershare.sharing.moments import Moments
from layershare.sharing.search import apart, automatic
from layershare.sharing.statistics import collect
from layershare.stacks import Stack, Weight
from quality.subject import Batches, Subject

LEAST_RANK = 8
SLACK = 1.011
"""Layer drop may keep a third of the layers at a budget of 33 %."""


class Made(NamedTuple):
    model: Any
    plan: SharingPlan = SharingPlan()
    base_bytes: int = 0
    """On disk, of what ``model.save_pretrained`` leaves out: the base of a PEFT model."""
    stored: int = 0
    """Layer parameters, where ``model`` computes with products of what would be stored."""


def ours(subject: Subject, budget: float, unique: int | None = None) -> Made:
    """As ``share --preset auto --fit sequential`` makes it."""

    def fitted(batches: Batches, plan: SharingPlan) -> Any:
        return layershare.share(
            subject.teacher, plan, calibration=batches, fit="sequential", known=subject.moments
        )

    some, judging = apart(subject.calibration)
    plan = automatic(
        subject.teacher, subject.stacks, budget, lambda: subject.change(judging), lambda: subject.moments,
        unique=unique, fitted=partial(fitted, some),
    )  # fmt: skip
    return Made(fitted(subject.calibration, plan), plan)


def ours_faster(subject: Subject, budget: float) -> Made:
    """``auto`` on two thirds of the layers, or on one more than fit whole."""
    (stack,) = subject.stacks
    return ours(subject, budget, max(int(budget * stack.length) + 1, round(stack.length * 2 / 3)))


def fewer_layers(subject: Subject, budget: float) -> Made:
    """Layer drop (DistilBERT, Sanh et al., 2019, 1910.01108): as many evenly spaced layers as fit.

    Spread healed better than the layers that are missed most (docs/log.md)."""
    (stack,) = subject.stacks
    return dropped(subject, stack, max(1, int(budget * SLACK * stack.length)))


def more_layers(subject: Subject, budget: float) -> Made | None:
    """One layer more than fits; None where the budget is a number of layers."""
    (stack,) = subject.stacks
    fit = max(1, int(budget * SLACK * stack.length))
    return None if abs(fit / stack.length - budget) < 0.005 else dropped(subject, stack, fit + 1)


def dropped(subject: Subject, stack: Stack, layers: int) -> Made:
    plan = SharingPlan(stacks=(drop_to(stack, spread(stack.length, layers)),))
    return Made(layershare.share(subject.teacher, plan), plan)


def svd(subject: Subject, budget: float) -> Made:
    """SVD-LLM (Wang et al., 2024, 2403.07378): whitened, truncation-aware, every matrix at one ratio, no fine-tuning.

    Any S with S S^T = E[x x^T] gives the same product of the best rank; the Cholesky factor there and here.
    """
    plan = densest(subject, budget, lambda stack, density: ranked(stack, density, ()))
    return Made(layershare.share(subject.teacher, plan, calibration=Moments(subject.inputs)), plan)


def pifa(subject: Subject, budget: float) -> Made:
    """The same with pivots, so that more ranks fit (PIFA: Zhao et al., 2025, 2501.19090; not its reconstruction)."""
    plan = densest(subject, budget, partial(ranked, shared=(), pivots=True))
    return Made(layershare.share(subject.teacher, plan, calibration=Moments(subject.inputs)), plan)


def basis_sharing(subject: Subject, budget: float) -> Made:
    """Basis Sharing (Wang et al., 2024, 2410.03765) as its authors configure it: bases of two consecutive layers for
    what reads the hidden states, all else private, one ratio; from 40 % off on, coefficients fitted once more to the
    inputs in the compressed model."""
    plan = densest(subject, budget, lambda stack, density: ranked(stack, density, subject.basis_shares))
    student = layershare.share(subject.teacher, plan, calibration=Moments(subject.inputs))
    if budget <= 0.6:
        refit(subject, student, plan)
    return Made(student, plan)


def ranked(stack: Stack, density: float, shared: Iterable[str], *, pivots: bool = False) -> StackPlan:
    """Every matrix, or pair of them where ``shared``, at the rank that stores ``density`` of it."""
    groups = []
    for start in range(0, stack.length, 2):
        pair = [p for p in (start, start + 1) if p < stack.length]
        for weight in (w for w in stack.layers[start] if w.factorable):
            for positions in [pair] if weight.name in shared else [[one] for one in pair]:
                rank = (pivoted_rank if pivots else rank_of)(weight, len(positions), density)
                groups.append(
                    Group(
                        positions=tuple(positions),
                        parts=(weight.name,),
                        method="basis",
                        rank=rank,
                        pivots=pivots,
                    )
                )
    return StackPlan(name=stack.name, length=stack.length, groups=tuple(groups))


def rank_of(weight: Weight, layers: int, density: float) -> int:
    out, into = weight.shape
    return max(1, int(density * weight.size * layers / (into + layers * out)))


def pivoted_rank(weight: Weight, layers: int, density: float) -> int:
    """r with r (in + out - r) + in, the indices of the pivots, nearest below ``density`` of the matrix."""
    assert layers == 1
    (out, into), room = weight.shape, density * weight.size
    fits = [rank for rank in range(1, min(out, into)) if rank * (into + out - rank) + into <= room]
    return max(fits, default=1)


def densest(subject: Subject, budget: float, make: Callable[[Stack, float], StackPlan]) -> SharingPlan:
    density = highest_density(subject, budget, make)
    return SharingPlan(stacks=tuple(make(stack, density) for stack in subject.stacks))


def highest_density(subject: Subject, budget: float, make: Callable[[Stack, float], StackPlan]) -> float:
    for per_mille in range(999, 0, -1):
        plan = SharingPlan(stacks=tuple(make(stack, per_mille / 1000) for stack in subject.stacks))
        if layershare.predict(subject.stacks, plan).ratio <= budget:
            return per_mille / 1000
    raise SystemExit(f"nothing fits {budget}")


@torch.no_grad()
def refit(subject: Subject, student: Any, plan: SharingPlan) -> None:
    """The private factors once more, by least squares, where the compressed model's inputs are."""
    groups = [
        [f"{stack.name}.{p}.{group.parts[0].removesuffix('.weight')}" for p in group.positions]
        for stack in plan.stacks for group in stack.groups
    ]  # fmt: skip
    grams = collect(student, [name for names in groups for name in names], subject.calibration)
    for names in groups:
        gram = torch.stack([grams[name] for name in names]).sum(0)
        down = student.get_submodule(names[0]).down
        ups = [fit_up(subject.teacher.get_submodule(name).weight, down, gram) for name in names]
        up, new = balanced(torch.cat(ups), down)
        down.copy_(new)
        for name, part in zip(names, up.split([len(one) for one in ups]), strict=True):
            student.get_submodule(name).up.copy_(part)


def tied(subject: Subject, budget: float) -> Made:
    """Relaxed Recursive Transformers (Bae et al., 2024, 2410.20672): a cycle of averaged layers, with LoRA factors from
    an SVD of what is left of each weight; as many layers as leave room for a rank of 8."""
    (stack,) = subject.stacks
    for unique in range(stack.length // 2, 0, -1):
        if stack.length % unique:
            continue
        fits = [
            plan
            for rank in range(LEAST_RANK, 8 * LEAST_RANK * stack.length)
            if (plan := attempt(subject, unique, rank, budget))
        ]
        if fits:
            return Made(layershare.share(subject.teacher, fits[-1]), fits[-1])
    raise SystemExit(f"nothing fits {budget}")


def attempt(subject: Subject, unique: int, rank: int, budget: float) -> SharingPlan | None:
    """None where a matrix is too small for the rank, or it is over the budget."""
    try:
        plan = layershare.make_plan(subject.teacher, "cycle", unique=unique, rank=rank)
        return plan if layershare.predict(subject.stacks, plan).ratio <= budget else None
    except layershare.LayershareError:
        return None


def replicated(subject: Subject, budget: float) -> Made:
    """PEFT's ``layer_replication``: as many evenly spaced layers as leave room for LoRA of rank 8 at each of the
    original's positions; only LoRA is trained."""
    from peft import LoraConfig, get_peft_model

    (stack,) = subject.stacks
    whole, room = subject.whole, budget * subject.whole
    each = sum(sum(w.shape) for layer in stack.layers for w in layer if w.factorable and w.kind == "linear")
    for unique in range(stack.length - 1, 0, -1):
        rank = int((room - whole * unique / stack.length) / each)
        if rank >= LEAST_RANK:
            break
    else:
        raise SystemExit(f"nothing fits {budget}")
    base = dropped(subject, stack, unique).model
    stored = bytes_of(base)
    order = [position * unique // stack.length for position in range(stack.length)]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=subject.adapted,
        layer_replication=[(i, i + 1) for i in order],
    )  # fmt: skip
    torch.manual_seed(0)
    return Made(get_peft_model(base, config), base_bytes=stored)


def bytes_of(model: Any) -> int:
    """Of its weight files, as ``save_pretrained`` writes them."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


OURS = "layershare"
"""What our sides begin with."""
SIDES: dict[str, Callable[[Subject, float], Made | None]] = {
    "layershare (auto)": ours,
    "layershare (auto, fewer layers)": ours_faster,
    "layer drop": fewer_layers,
    "layer drop, one layer more": more_layers,
    "SVD-LLM (per-layer whitened SVD)": svd,
    "SVD-LLM, pivoted (PIFA)": pifa,
    "Basis Sharing": basis_sharing,
    "Relaxed Recursive (cycle + SVD LoRA)": tied,
    "PEFT layer_replication + LoRA": replicated,
}
