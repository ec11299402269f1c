"""What the teacher is asked for, and what it says when it is run on each batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from layershare.heal.losses import TopLogits, keep_top
from layershare.heal.relations import attention_maps, capture
from layershare.tasks import Task
from layershare.tasks.task import Axis


@dataclass(frozen=True)
class Wanted:
    """What is asked of a teacher; positions of layers count from 0.

    Attributes:
        answer: the embedding or the logits, whichever the task has.
        hidden: the layers whose output is wanted.
        relations: the layer whose queries, keys and values are wanted.
        top: keep this many of the largest logits only (0: all), to be compared at ``temperature``.
    """

    answer: bool = True
    hidden: tuple[int, ...] = ()
    relations: int | None = None
    top: int = 0
    temperature: float = 1.0


@dataclass(frozen=True)
class Target:
    """The teacher's view of a batch.

    Attributes:
        embedding: [B, d]. logits: [B, C], or such entries for tokens; TopLogits of it when asked for.
        hidden: layer -> [B, T, d].
        relations: ``q``, ``k``, ``v`` -> [B, T, d].
        values, value_weights: as in :class:`~layershare.tasks.task.Outputs`.
        along: ``logits``, ``hidden-LAYER``, ``relations`` -> the axis they lie along; empty if it was cached.

    What belongs to a token is 0 where the batch is padded, if it was cached; the losses never look there.
    """

    embedding: Tensor | None = None
    logits: Tensor | TopLogits | None = None
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    relations: Mapping[str, Tensor] = field(default_factory=dict)
    along: Mapping[str, Axis | None] = field(default_factory=dict)
    values: Tensor | None = None
    value_weights: Tensor | None = None


Ask = Callable[[Mapping[str, Tensor], Tensor], Target]
"""(model inputs of a batch, [B] row numbers of its texts) -> Target on the device of the inputs."""


def live(teacher: nn.Module, task: Task, wanted: Wanted = Wanted()) -> Ask:
    """Run the teacher on each batch, in eval mode and without gradients.

    Needed where the input changes from epoch to epoch (augmentation), or the targets are too big to keep.
    """

    maps = attention_maps(teacher, wanted.relations)

    def ask(inputs: Mapping[str, Tensor], rows: Tensor) -> Target:  # noqa: ARG001 - one signature for both
        device = next(iter(inputs.values())).device
        if next(teacher.parameters()).device != device:
            teacher.to(device)
        teacher.eval()
        with torch.no_grad(), capture(maps) as relations:
            out = task.forward(teacher, inputs, hidden_states=bool(wanted.hidden))
        logits: Tensor | TopLogits | None = out.logits if wanted.answer else None
        if wanted.top and isinstance(logits, Tensor):
            logits = keep_top(logits, wanted.top, wanted.temperature)
        return Target(
            out.embedding if wanted.answer else None,
            logits,
            {layer: out.hidden_states[layer + 1] for layer in wanted.hidden},
            relations,
            {"logits": out.along, "relations": "source"}
            | {f"hidden-{layer}": out.axis(layer) for layer in wanted.hidden},
            out.values if wanted.answer else None,
            out.value_weights if wanted.answer else None,
        )

    return ask
