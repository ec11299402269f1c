"""Which parameters of the student are trained."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from layershare.errors import OptionError
from layershare.heal.config import DistillConfig
from layershare.linear import FACTORS, GATE

SHARED = ("base", "atoms")
"""Leaves of a factored map that are shared by definition, however many positions use them."""


@contextmanager
def only_trained(student: nn.Module, config: DistillConfig) -> Iterator[None]:
    """Within it, what ``config`` leaves as it is takes no gradient: embedding tables (large, hardly changed by healing,
    slow to update), and with ``trained = "deltas"`` all that is not a position's own beside what it shares.

    Raises OptionError where nothing is left to train.
    """
    left = (
        {id(parameter) for parameter in deltas(student) if parameter.requires_grad}
        if config.trained == "deltas"
        else None
    )
    if left is not None and not left:
        raise OptionError(
            "trained = deltas: no position has a correction, a factor or a gate of its own.",
            "Share with a rank, with gates, or train all.",
        )
    tables = {
        id(module.weight) for module in student.modules()
        if isinstance(module, nn.Embedding) and not config.train_embeddings
    }  # fmt: skip
    frozen = [
        parameter
        for parameter in student.parameters()
        if parameter.requires_grad
        and (id(parameter) in tables if left is None else id(parameter) not in left)
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def deltas(model: nn.Module) -> list[nn.Parameter]:
    """The factors, mixes and diagonals that one position alone has, and the gates."""
    named = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in named)
    own = (*(leaf for leaf in FACTORS if leaf not in SHARED), GATE)
    return [p for name, p in named if name.rpartition(".")[2] in own and uses[id(p)] == 1]
