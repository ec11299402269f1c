"""The code of Basis Sharing's authors as a side: their calibration, their bases and coefficients, in the same model.

``folder`` is a clone of TUDa-HWAI/Basis_Sharing; nothing of it is kept here. Their model classes need an older
transformers, so the products of their bases and coefficients are put into copies of the original's weights, which is
the same function. Their update of coefficients (from 40 % off on) needs those classes and is left out.
"""

import copy
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layershare.sharing.lowrank import shared_input
from quality.peers import Made, highest_density, ranked
from quality.subject import Subject

TYPE = "llama2"
"""How their code is told that layers are in ``model.layers`` and weights are (out, in)."""


class Authors(NamedTuple):
    group: Any
    calib: Any
    utils: Any
    seen: Any
    kept: str


def authors_own(folder: Path) -> Callable[[Subject, float], Made | None]:
    """Two layers a basis, as configured for Mistral (a decoder with grouped queries) or Llama (else)."""
    return lambda subject, budget: None if budget <= 0.6 else made_by(folder, subject, budget)


@torch.no_grad()
def made_by(folder: Path, subject: Subject, budget: float) -> Made:
    (stack,) = subject.stacks
    student = copy.deepcopy(subject.teacher)
    density = highest_density(subject, budget, lambda one, d: ranked(one, d, subject.basis_shares))
    stored = subject.whole - sum(w.size for layer in stack.layers for w in layer if w.factorable)
    with calibrated(folder, subject) as authors:
        for weight in (w for w in stack.layers[0] if w.factorable):
            out, into = weight.shape
            size = 2 if weight.name in subject.basis_shares else 1
            rank = authors.utils.compute_num_basis(into, out, size, 100 * (1 - density))
            for start in range(0, stack.length, size):
                members = list(range(start, min(start + size, stack.length)))
                stored += rank * (into + out * len(members))
                for position, product in zip(members, products(authors, weight, members, rank), strict=True):
                    student.get_parameter(f"{stack.name}.{position}.{weight.name}").copy_(product)
    return Made(student, stored=stored)


@contextmanager
def calibrated(folder: Path, subject: Subject) -> Iterator[Authors]:
    """Their modules, after their calibration on the subject's texts."""
    sys.path.insert(0, str(folder))
    group, calib, utils = (importlib.import_module(name) for name in ("group", "calib", "utils"))
    sys.path.remove(str(folder))
    (stack,) = subject.stacks
    names = [w.name.removesuffix(".weight") for w in stack.layers[0] if w.factorable]
    seen = Seen(subject.teacher, stack.name)
    with tempfile.TemporaryDirectory() as kept:
        calib.Calib.build_calibration_dataset(seen, subject.calibration, names, TYPE, kept)
        yield Authors(group, calib, utils, seen, kept)


class Seen:
    """A model with its layers where their code looks for them."""

    def __init__(self, model: Any, stack: str) -> None:
        self.call, self.config, self.device, self.eval = model, model.config, model.device, model.eval
        self.model = SimpleNamespace(layers=model.get_submodule(stack))

    def __call__(self, **batch: Tensor) -> Any:
        """Without padding, of which their code knows nothing."""
        lengths = batch.get("attention_mask")
        if lengths is None:
            return self.call(**batch)
        for row, length in enumerate(lengths.sum(1)):
            self.call(**{name: value[row : row + 1, :length] for name, value in batch.items()})
        return None


def products(authors: Authors, weight: Any, members: list[int], rank: int) -> list[Tensor]:
    """What the layers ``members`` compute with instead of ``weight``, each (out, in)."""
    name = weight.name.removesuffix(".weight")
    s, inverse = authors.calib.Calib.get_s_inv_s(members, name, TYPE, authors.kept)
    made = authors.group.Group(authors.seen, members, name, weight.shape[0], TYPE, s, inverse)
    own = made.coefficient[:rank].split(weight.shape[0], dim=1)
    return [(made.basis[:, :rank] @ one).T for one in own]


@torch.no_grad()
def compare(folder: Path, subject: Subject) -> None:
    """Print how far their products and ours are apart, for the first two layers of every matrix, at half the ranks."""
    (stack,) = subject.stacks
    with calibrated(folder, subject) as authors:
        for weight in (w for w in stack.layers[0] if w.factorable):
            rank, names = min(weight.shape) // 2, [f"{stack.name}.{p}.{weight.name}" for p in (0, 1)]
            theirs = torch.cat(products(authors, weight, [0, 1], rank))
            dense = [subject.teacher.get_parameter(name) for name in names]
            grams = [subject.inputs[name.removesuffix(".weight")] for name in names]
            ups, down = shared_input(dense, rank, grams)
            ours = torch.cat(ups) @ down
            error = [float(seen(torch.cat(dense) - one, sum(grams))) for one in (theirs, ours)]
            apart = float(seen(theirs - ours, sum(grams)) / seen(torch.cat(dense), sum(grams)))
            print(f"{weight.name}: apart {apart:.2e}, error of theirs {error[0]:.6g}, of ours {error[1]:.6g}")


def seen(weight: Tensor, gram: Tensor) -> Tensor:
    """The size of the outputs."""
    return ((weight.double() @ gram.double()) * weight.double()).sum().sqrt()
