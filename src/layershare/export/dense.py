"""Dense export: the same model untied, a stock Hugging Face folder without any trace of sharing.

Tied weights are stored once a position, factored maps as the dense weights that they stand for. A gate has no place in
a stock architecture. One of 1 is taken away and one of 0 takes its position away, both exactly. A gate in between is
folded into the maps that write back into the residual stream. That is exact where all of them read the layer's input
(one branch as in Mamba, or branches side by side as in GPT-NeoX): ``h + g (a(h) + m(h))``. It is not where the second
branch reads what the first wrote, nor where a norm follows the sum, as in BERT; there the export is refused.
"""

import copy
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.adapt.places import places
from layershare.architectures.inputs import Inputs, find_inputs, run, tensors
from layershare.errors import LayershareError, ModelError, StoreError
from layershare.linear import GATE, kind_of
from layershare.measure.size import bytes_on_disk
from layershare.sharing import plan_of, unshare
from layershare.sharing.carry import unmark
from layershare.sharing.depth import drop_layers
from layershare.sharing.layout import find
from layershare.sharing.tie import layout_of, remove_gates
from layershare.stacks import find_stacks
from layershare.store.open import copy_preprocessing, load_model, new_folder

GATELESS = "Use --format onnx, which keeps gates, or share without them, for example with the preset basis."
HALF = (torch.float16, torch.bfloat16)
TOLERANCE = 1e-3
"""Largest difference of outputs, relative to the largest output, that counts as rounding (float32; half: 30 times)."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote. Bytes are of the weights files; ``difference`` is the largest one between any outputs of
    the shared model and of the exported one after loading, None where no inputs for a comparison were found."""

    out: str
    bytes_before: int
    bytes_after: int
    difference: float | None

    @property
    def cost(self) -> int:
        """Bytes more than the shared folder."""
        return self.bytes_after - self.bytes_before

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"cost": self.cost}

    def __str__(self) -> str:
        after, before, cost = (n / 1e6 for n in (self.bytes_after, self.bytes_before, abs(self.cost)))
        costs = "costs" if self.cost >= 0 else "saves"  # a skipped position is not stored
        checked = "not compared" if self.difference is None else f"differ by at most {self.difference:.1e}"
        return (
            f"{after:,.1f} MB of weights, every position with its own; shared they are {before:,.1f} MB, so this "
            f"{costs} {cost:,.1f} MB ({abs(self.cost):,} bytes).\nOutputs after loading: {checked}."
        )


def to_dense(folder: Path, out: Path) -> Exported:
    """Write the shared model in ``folder`` as an ordinary model folder ``out`` and load it again to compare.

    Raises ModelError if ``folder`` is not shared, or has gates for which there is no dense form, and StoreError if
    there is something in ``out``, or the outputs after loading differ by more than rounding (nothing is left then).
    """
    with new_folder(out) as part:
        model = load_model(folder)
        if plan_of(model) is None:
            raise ModelError(f"{folder} is not shared: it is a dense model already.")
        inputs, wanted = _inputs(model)
        dense = densify(model)
        dense.save_pretrained(part)
        copy_preprocessing(folder, part)
        half, name = dense.dtype in HALF, type(model).__name__
        del model, dense
        difference = None if inputs is None else _difference(wanted, run(load_model(part, name), inputs))
        scale = max((float(value.abs().max()) for value in wanted), default=1.0)
        if difference is not None and not difference <= TOLERANCE * scale * (30 if half else 1):
            raise StoreError(
                f"the dense form of {folder} differs from it by {difference:.1e} after loading: it was not kept."
            )
        return Exported(str(out), bytes_on_disk(folder), bytes_on_disk(part), difference)


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """A new model like the shared ``model``, in which every position has plain weights of its own, and no gate.

    Raises ModelError naming the first gate for which there is no dense form.
    """
    dense = unshare(model)
    plan = plan_of(dense)
    if plan is None:
        return dense
    layout = layout_of(dense, plan)
    gates = {name: dense.get_submodule(name).get_parameter(GATE).item() for name, _ in layout.gates}
    inputs = None
    for name, value in gates.items():
        if value not in (0, 1):
            inputs = inputs or _inputs(dense)[0]
            if inputs is None or not _fold(dense, name, value, inputs):
                raise ModelError(
                    f"{name} has a gate of {value:.4g}, for which there is no dense form: its second branch reads what "
                    "the first one wrote, or a norm follows the sum.",
                    GATELESS,
                )
    remove_gates(dense, layout)
    unmark(dense)
    gone: dict[str, list[int]] = {}
    for name in (name for name, value in gates.items() if value == 0):
        stack, _, position = name.rpartition(".")
        gone.setdefault(stack, []).append(int(position))
    for stack, positions in gone.items():
        try:
            dense = drop_layers(dense, find(find_stacks(dense, [stack]), stack), positions)
        except LayershareError as error:
            raise ModelError(
                f"gates of 0 skip positions {positions} of {stack!r}, which cannot be left out: {error.message}",
                GATELESS,
            ) from error
    return dense


@torch.no_grad()
def _fold(model: PreTrainedModel, name: str, value: float, inputs: Inputs) -> bool:
    """Scale what the layer ``name`` adds to its input by ``value``. False if it then computes something else than with
    its gate; the model is spoilt in that case."""
    layer, calls = model.get_submodule(name), []

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(copy.deepcopy((args, kwargs)))  # a cache is filled by every call

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    run(model, inputs)
    handle.remove()

    def outputs() -> Tensor:
        every = copy.deepcopy(calls)
        return torch.stack([next(tensors(layer(*args, **kwargs))) for args, kwargs in every]).double()

    wanted = outputs()
    for module in _writers(model, name, wanted.shape[-1]):
        for parameter in module.parameters(recurse=False):
            parameter.mul_(value)
    layer.get_parameter(GATE).fill_(1)
    # What counts is the layer's own contribution: it may be small beside what goes past it.
    added = wanted - torch.stack([next(tensors([args, kwargs])) for args, kwargs in calls]).double()
    rounding = (2e-2 if model.dtype in HALF else 1e-6) * wanted.abs().max()
    return bool((wanted - outputs()).abs().max() <= 1e-3 * added.abs().max() + rounding)


def _writers(model: PreTrainedModel, name: str, width: int) -> list[nn.Module]:
    """The linear maps of a layer that write back into the residual stream: the ends of attention and FFN, or the last
    one of a layer that has neither."""
    found = [
        model.get_submodule(p.module) for p in places(model) if p.ends and p.module.startswith(f"{name}.")
    ]
    maps = [module for module in model.get_submodule(name).modules() if kind_of(module) != "other"]
    return found or [module for module in maps if width in module.get_parameter("weight").shape][-1:]


def _inputs(model: PreTrainedModel) -> tuple[Inputs | None, list[Tensor]]:
    with suppress(Exception):  # of a model of an unknown kind any error may come
        return find_inputs(model)
    return None, []


def _difference(ones: list[Tensor], others: list[Tensor]) -> float:
    if [one.shape for one in ones] != [other.shape for other in others]:
        return float("inf")
    return max(
        float((one.float() - other.float()).abs().max()) for one, other in zip(ones, others, strict=True)
    )
