"""The progressive phase: layers of the student come in one by one, the teacher's stand in for the others.

Module replacement (BERT-of-Theseus, Xu et al., 2020, 2002.02925; DeltaLLM, Mikaelyan et al., 2025, 2501.18596, trains
the corrections of shared layers so): at each step every layer is the teacher's by chance, ever less often. A layer of
the student learns among layers that are right, and errors do not pile up while they are large.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from layershare.errors import OptionError
from layershare.heal.layers import LayerMap, depths, widths
from layershare.heal.local import layers_of
from layershare.sharing.carry import plan_of
from layershare.sharing.gate import has_gate, ungated
from layershare.sharing.tie import layout_of

FIRST = 0.5
"""The chance, at first, that a layer is the teacher's; it falls to 0 in a straight line."""


class Part(NamedTuple):
    """A layer of the student, and the layers of the teacher in whose place it stands."""

    layer: nn.Module
    place: tuple[nn.Module, ...]


def parts_in_place(student: Any, teacher: Any, pairs: LayerMap) -> list[Part]:
    """Who stands for whom: a layer for all that the teacher computes between the outputs that ``pairs`` compare.

    Raises OptionError where a layer has no place or cannot take it: another width, a map that leaves layers out or
    turns back.
    """
    ours, theirs = ("/".join(map(str, widths(model.config))) for model in (student, teacher))
    if ours != theirs:
        raise OptionError(
            f"Layers of width {theirs} cannot stand in for those of width {ours}.", "Set progressive to 0."
        )
    mine, its = layers_of(student), layers_of(teacher)
    if [list(map(len, mine)), list(map(len, its))] != [list(depths(student)), list(depths(teacher))]:
        raise OptionError(f"The layers of {type(student).__name__} were not found.", "Set progressive to 0.")
    if any(_lends(model) for model in (student, teacher)):
        raise OptionError(
            "Positions that read keys and values from another one (kv = true) cannot come in one by one.",
            "Set progressive to 0.",
        )
    ends, found = dict(pairs), []
    first, before = 0, 0
    for layers, olds in zip(mine, its, strict=True):
        reached = before
        for number, layer in enumerate(layers, first):
            end = ends.get(number, reached - 1) + 1
            if not reached < end <= before + len(olds):
                raise OptionError(
                    f"The layer map gives student layer {number} no layers of the teacher.",
                    "Pair every layer, in order, or set progressive to 0.",
                )
            found.append(Part(layer, tuple(olds[reached - before : end - before])))
            reached = end
        first, before = first + len(layers), before + len(olds)
        if reached != before:
            raise OptionError(
                "The layer map ends before the teacher's last layer.",
                "Pair the last layers, or set progressive to 0.",
            )
    _refuse_strangers(found, teacher)
    return found


def _refuse_strangers(parts: Sequence[Part], teacher: Any) -> None:
    """Raise OptionError where layers of the teacher would not compute in the student what they do in the teacher."""
    if any(len(part.place) > 1 for part in parts) and (
        teacher.config.is_encoder_decoder or len(set(getattr(teacher.config, "layer_types", None) or ())) > 1
    ):
        raise OptionError(
            f"The layers of {type(teacher).__name__} differ: several of them cannot stand in for one.",
            "Set progressive to 0.",
        )
    for layer, place in parts:
        if any(has_gate(old) for old in place):
            raise OptionError("A teacher with gates cannot stand in.", "Set progressive to 0.")
        kinds = {next(one.parameters()).dtype for one in (layer, *place)}
        if len(kinds) > 1:
            raise OptionError(
                f"Student and teacher are of {' and '.join(sorted(map(str, kinds)))}.",
                "Load both in one precision, or set progressive to 0.",
            )


def _lends(model: Any) -> bool:
    plan = plan_of(model)
    return plan is not None and bool(layout_of(model, plan).lent)


def replaced_at(step: int, steps: int, layers: int, seed: int) -> list[int]:
    """Which layers are the teacher's at this of so many steps; never all of them. The same for the same numbers."""
    draw = random.Random(f"{seed} {step}")
    chance = FIRST * (1 - step / steps)
    found = [i for i in range(layers) if draw.random() < chance]
    if len(found) == layers:
        found.remove(draw.choice(found))
    return found


@contextmanager
def stand_in(parts: Sequence[Part]) -> Iterator[None]:
    """Within it, the teacher's layers compute in the place of those of the student: gradients pass through them, and
    none is kept for them."""
    with ExitStack() as undo:
        for layer, place in parts:
            for old in place:
                undo.callback(old.train, old.training)
                old.eval().to(next(layer.parameters()).device)
            for parameter in (p for old in place for p in old.parameters() if p.requires_grad):
                undo.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
            undo.enter_context(ungated(layer))
            # The module stays, for all that watches it; an attribute of its own goes before that of its class.
            undo.callback(_give_back, layer, layer.__dict__.get("forward"))
            layer.forward = _one_by_one(place)
        yield


def _give_back(layer: nn.Module, forward: Any) -> None:
    del layer.__dict__["forward"]
    if forward is not None:
        layer.forward = forward


def _one_by_one(layers: Sequence[nn.Module]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = layers[0].forward(*args, **kwargs)
        for layer in layers[1:]:
            if not isinstance(out, Tensor):
                raise OptionError(
                    f"{type(layer).__name__} takes more than hidden states from the layer before it.",
                    "Set progressive to 0.",
                )
            if args:
                args = (out, *args[1:])
            else:
                kwargs["hidden_states"] = out
            out = layer.forward(*args, **kwargs)
        return out

    return forward
