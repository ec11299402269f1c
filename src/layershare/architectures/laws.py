"""The laws on one small model: what sharing promises, checked on any architecture.

Where the stock model with the same weights (the unshared one) does not keep a law (it generates otherwise without its
cache, it draws random weights after loading), the law is said not to apply, with that reason; it is never counted as
kept.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from layershare.architectures.inputs import Inputs, finite, run, same, tensors
from layershare.errors import LayershareError, PlanError
from layershare.plan import SharingPlan
from layershare.sharing import make_plan, share, unshare, verify
from layershare.stacks import find_stacks

# What is tried on every model: the preset, and its number.
PRESETS: dict[str, dict[str, int]] = {
    "adjacent": {"unique": 2},
    "cycle_rev": {"unique": 2},
    "all": {},
    "basis": {"rank": 2},
}
HEADER = 65_536
"""Bytes that names and shapes may take in a safetensors file, at most."""


@dataclass
class Report:
    """What was found. ``failed`` and ``skipped``: law -> reason, prefixed by the preset where one matters."""

    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def check(
        self, law: str, test: Callable[[], str | None], stock: Callable[[], str | None] | None = None
    ) -> None:
        """``test`` returns None or what is wrong. What is wrong with the stock model as well is no fault of sharing."""
        wrong = _outcome(test)
        if wrong is None:
            self.kept.append(law)
        elif stock is not None and (also := _outcome(stock)) is not None:
            self.skipped[law] = f"the stock model: {also}"
        else:
            self.failed[law] = wrong


def check_laws(
    model: PreTrainedModel, inputs: Inputs, auto_class: str, presets: dict[str, Any] = PRESETS
) -> Report:
    """Share ``model`` by each preset and look whether everything holds that sharing promises."""
    report = Report()
    for preset, options in presets.items():
        plan = _plan(model, preset, options)
        if not any(stack.groups for stack in plan.stacks):
            report.skipped[f"{preset}: shared"] = "the plan shares nothing: its stacks are too short"
            continue
        try:
            student = share(model, plan)
        except PlanError as error:
            if "shares nothing" not in error.message:
                raise
            report.skipped[f"{preset}: shared"] = error.message
            continue
        _check_one(report, preset, student, inputs, auto_class)
    return report


def _plan(model: PreTrainedModel, preset: str, options: dict[str, Any]) -> SharingPlan:
    stacks = [stack for stack in find_stacks(model) if not stack.tied]
    return make_plan(stacks, preset, **options)


def _check_one(
    report: Report, preset: str, student: PreTrainedModel, inputs: Inputs, auto_class: str
) -> None:
    outputs, dense = run(student, inputs), unshare(student)
    report.check(f"{preset}: finite", lambda: None if finite(outputs) else "not finite")
    with TemporaryDirectory() as folder:
        loaded: list[PreTrainedModel] = []
        report.check(
            f"{preset}: saved and loaded",
            lambda: _reload(student, Path(folder), auto_class, inputs, loaded),
            lambda: _reload_stock(dense, auto_class, inputs),
        )
        report.check(f"{preset}: bytes", lambda: _too_many_bytes(student, Path(folder)))
        if loaded:
            report.check(f"{preset}: tied after loading", lambda: _untied(loaded[0]))
            report.check(
                f"{preset}: tied after a step", lambda: _step(loaded[0], inputs), lambda: _step(dense, inputs)
            )
    if student.can_generate():
        for beams in (1, 2):
            report.check(
                f"{preset}: cached generation, {beams} beams",
                lambda beams=beams: _cache_differs(student, inputs, beams),  # type: ignore[misc]
                lambda beams=beams: _cache_differs(dense, inputs, beams),  # type: ignore[misc]
            )
    report.check(f"{preset}: unshared", lambda: _unshared_differs(outputs, unshare(student), inputs, preset))


def _outcome(test: Callable[[], str | None]) -> str | None:
    try:
        return test()
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:200]}"


def _load(folder: Path, auto_class: str) -> PreTrainedModel:
    """Loaded, and moved: tensors lie where their file has them, and kernels may round otherwise on unaligned memory."""
    model = getattr(transformers, auto_class).from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _reload(
    model: PreTrainedModel, folder: Path, auto_class: str, inputs: Inputs, loaded: list[PreTrainedModel]
) -> str | None:
    model.save_pretrained(folder)
    loaded.append(_load(folder, auto_class))
    return None if same(run(model, inputs), run(loaded[0], inputs)) else "other outputs after loading"


def _reload_stock(model: PreTrainedModel, auto_class: str, inputs: Inputs) -> str | None:
    with TemporaryDirectory() as folder:
        return _reload(model, Path(folder), auto_class, inputs, [])


def _too_many_bytes(model: PreTrainedModel, folder: Path) -> str | None:
    size = sum(os.path.getsize(file) for file in folder.glob("*.safetensors"))
    unique = {value.data_ptr(): value.numel() * value.element_size() for value in model.state_dict().values()}
    limit = 1.02 * sum(unique.values()) + HEADER
    return None if 0 < size <= limit else f"{size} bytes for {sum(unique.values())} unique ones"


def _untied(model: PreTrainedModel) -> str | None:
    account = verify(model)
    return None if account.uses or account.factored else "nothing is tied"


def _step(model: PreTrainedModel, inputs: Inputs) -> str | None:
    """One optimizer step on the sum of squared outputs."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    loss = sum(output.float().square().mean() for output in tensors(model(**inputs)) if output.requires_grad)
    if not isinstance(loss, Tensor):
        return "its outputs have no gradient"
    loss.backward()
    optimizer.step()
    model.zero_grad()
    try:
        verify(model)
    except LayershareError as error:
        return None if "carries no sharing plan" in str(error) else str(error)
    return None


@torch.no_grad()
def _tokens(model: PreTrainedModel, inputs: Inputs, beams: int, cache: bool) -> Tensor:
    torch.manual_seed(0)
    given = {
        name: value.clone() if isinstance(value, Tensor) else value  # some write into them (BLIP)
        for name, value in inputs.items() if not name.startswith("decoder_")
    }  # fmt: skip
    return model.generate(  # type: ignore[operator]
        **given, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams, use_cache=cache
    )


def _cache_differs(model: PreTrainedModel, inputs: Inputs, beams: int) -> str | None:
    cached, uncached = (_tokens(model, inputs, beams, cache) for cache in (True, False))
    equal = isinstance(cached, Tensor) and isinstance(uncached, Tensor) and torch.equal(cached, uncached)
    return None if equal else "other tokens without its cache"


def _unshared_differs(ones: list[Tensor], dense: PreTrainedModel, inputs: Inputs, preset: str) -> str | None:
    """Bit-identical for ties; a basis multiplies its factors out, which rounds."""
    others = run(dense, inputs)
    if preset != "basis":
        return None if same(ones, others) else "other outputs after unshare"
    close = len(ones) == len(others) and all(map(_close, ones, others))
    return None if close else "other outputs after unshare"


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * max(1.0, float(one.abs().max())))
