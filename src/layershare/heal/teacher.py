"""What the teacher says: asked once for every training text and kept, or asked anew for each batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layershare.tasks import Task
from layershare.tasks.encoding import batches


@dataclass(frozen=True)
class Target:
    """The teacher's view of a batch: ``embedding`` [B, d], ``logits`` [B, C], ``hidden`` layer -> [B, T, d].

    Hidden states are 0 where the batch is padded, if they were cached; the losses never look there.
    """

    embedding: Tensor | None
    logits: Tensor | None
    hidden: Mapping[int, Tensor]


Ask = Callable[[Mapping[str, Tensor], Tensor], Target]
"""(model inputs of a batch, [B] row numbers of its texts) -> Target on the device of the inputs."""


def live(teacher: nn.Module, task: Task, layers: Sequence[int] = ()) -> Ask:
    """Run the teacher on each batch, in eval mode and without gradients.

    Needed where the input changes from epoch to epoch (augmentation), or the targets are too big to keep.
    ``layers``: positions, counted from 0, whose output is wanted.
    """

    def ask(inputs: Mapping[str, Tensor], rows: Tensor) -> Target:  # noqa: ARG001 - one signature for both
        device = inputs["input_ids"].device
        if next(teacher.parameters()).device != device:
            teacher.to(device)
        teacher.eval()
        with torch.no_grad():
            out = task.forward(teacher, inputs, hidden_states=bool(layers))
        return Target(out.embedding, out.logits, {i: out.hidden_states[i + 1] for i in layers})

    return ask


def cached(
    teacher: nn.Module,
    task: Task,
    tokenizer: Any,
    dataset: Any,
    layers: Sequence[int] = (),
    *,
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Ask:
    """Run the teacher once over the texts and keep what it says, in float32 on the CPU.

    Hidden states are kept for real tokens only, end to end. Equal to :func:`live` up to rounding: a text is
    computed beside others than in training, so the padding differs.

    Args:
        dataset: token ids, one row a text, as ``task.encode`` gives them.
        layers: positions, counted from 0, whose output is kept.
        rows: the rows that will be asked for (default: all); asking for another one is an IndexError.
        device: where the teacher runs (default: where it is).
    """
    wanted = torch.arange(len(dataset)) if rows is None else torch.tensor(sorted(set(rows)))
    encoded = {name: [column[i] for i in wanted.tolist()] for name, column in _columns(dataset).items()}
    lengths = torch.tensor([sum(mask) for mask in encoded["attention_mask"]])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    place = torch.full((len(dataset),), -1)
    place[wanted] = torch.arange(len(wanted))
    vectors: dict[str, Tensor] = {}
    hidden: dict[int, Tensor] = {}
    ask = live(teacher, task, layers)
    for where, batch in batches(tokenizer, encoded, batch_size):
        inputs = {
            name: values.to(device or next(teacher.parameters()).device) for name, values in batch.items()
        }
        target = ask(inputs, wanted[where])
        for name, value in (("embedding", target.embedding), ("logits", target.logits)):
            if value is not None:
                vectors.setdefault(name, torch.empty(len(wanted), value.shape[1]))[where] = (
                    value.float().cpu()
                )
        slots = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in where])
        for layer, states in target.hidden.items():
            store = hidden.setdefault(layer, torch.empty(int(starts[-1]), states.shape[-1]))
            store[slots] = states[inputs["attention_mask"].bool()].float().cpu()

    def recall(inputs: Mapping[str, Tensor], rows: Tensor) -> Target:
        at = place[rows.cpu()]
        if bool((at < 0).any()):
            raise IndexError(f"No target was computed for rows {rows[at < 0].tolist()}.")
        mask = inputs["attention_mask"].bool()
        kept = {name: values[at].to(mask.device) for name, values in vectors.items()}
        slots = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in at])
        states = {}
        for layer, store in hidden.items():
            states[layer] = torch.zeros(*mask.shape, store.shape[1], device=mask.device)
            states[layer][mask] = store[slots].to(mask.device)
        return Target(kept.get("embedding"), kept.get("logits"), states)

    return recall


def cache_bytes(dataset: Any, rows: Sequence[int], layers: Sequence[int], width: int) -> int:
    """Bytes that :func:`cached` keeps for these rows with hidden size ``width`` (logits not counted)."""
    masks = dataset["attention_mask"]
    tokens = sum(sum(masks[i]) for i in set(rows)) if layers else 0
    return 4 * width * (len(set(rows)) + tokens * len(layers))


def _columns(dataset: Any) -> dict[str, list]:
    return {name: dataset[name][:] for name in dataset.column_names}
