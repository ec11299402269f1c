"""Train the heads. The layers are frozen, so what a head reads is computed once for each text."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layershare.exits.config import ExitsConfig
from layershare.exits.tail import Tail, states_of
from layershare.tasks.encoding import INPUTS, batches


@dataclass(frozen=True)
class Read:
    """What is known of N texts.

    ``pooled``: pooling -> position -> what a head there reads [N, d]. ``logits``: what the model says [N, classes].
    """

    pooled: Mapping[str, Mapping[int, Tensor]]
    logits: Tensor

    def of(self, head: nn.Module, position: int) -> Tensor:
        return self.pooled[head.pooling][position]  # type: ignore[index]


@torch.no_grad()
def read(
    model: Any, tail: Tail, positions: Sequence[int], tokenizer: Any, rows: Mapping[str, Sequence[Any]],
    batch_size: int = 64,
) -> Read:  # fmt: skip
    """Run the model over encoded texts (columns of token ids), in full depth, and keep what its exits could read."""
    columns = {name: rows[name][:] for name in INPUTS if name in rows}
    poolings = candidates(tail)
    found: dict[tuple[str, int], list[Tensor]] = {(name, p): [] for name in poolings for p in positions}
    mask: list[Tensor] = [torch.empty(0)]

    def keep(position: int, _: nn.Module, __: tuple, output: Any) -> None:
        for name in poolings:
            found[name, position].append(tail.pooled(states_of(output), mask[0], name).float())

    handles = [
        model.get_submodule(f"{tail.stack.name}.{p}").register_forward_hook(partial(keep, p))
        for p in positions
    ]
    order: list[int] = []
    logits: list[Tensor] = []
    try:
        model.eval()
        for indices, batch in batches(tokenizer, columns, batch_size):
            mask[0] = batch["attention_mask"]
            logits.append(model(**batch).logits.float())
            order += indices
    finally:
        for handle in handles:
            handle.remove()
    back = torch.tensor(order).argsort()
    return Read(
        {name: {p: torch.cat(found[name, p])[back] for p in positions} for name in poolings},
        torch.cat(logits)[back],
    )


def candidates(tail: Tail) -> list[str]:
    """The poolings that an exit may have: the model's own, and the mean."""
    return list(dict.fromkeys((tail.pooling, "mean")))


def answers(heads: nn.ModuleDict, seen: Read) -> Tensor:
    """The logits of every exit, and last the model's own: [E + 1, N, classes]."""
    with torch.no_grad():
        said = [head(seen.of(head, int(position))).float() for position, head in heads.items()]
    return torch.stack([*said, seen.logits])


def fit(
    trials: Sequence[nn.ModuleDict], train: Read, validation: Read, config: ExitsConfig
) -> tuple[nn.ModuleDict, list[dict[str, Any]]]:
    """Train several sets of heads, in place, by the divergence of what they say from what the model says in the end.

    Returns for each position the head, with its weights of the epoch, that was best on the validation texts; and a line
    for each epoch: the losses in training and on the validation texts, the mean over all heads.
    """
    every = nn.ModuleList(trials)
    draw = torch.Generator().manual_seed(config.seed)
    count, size = len(train.logits), config.batch_size
    steps = config.epochs * -(-count // size)
    optimizer = torch.optim.AdamW(every.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    best: dict[str, tuple[float, nn.Module]] = {}
    history = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # dropout
        for epoch in range(1, config.epochs + 1):
            every.train()
            total = 0.0
            for rows in torch.randperm(count, generator=draw).split(size):
                losses = [divergence(head, p, train, rows) for heads in trials for p, head in heads.items()]
                loss = torch.stack(losses).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows) / len(losses)
            every.eval()
            held = []
            with torch.no_grad():
                for position, head in ((p, head) for heads in trials for p, head in heads.items()):
                    held.append(divergence(head, position, validation).item())
                    if position not in best or held[-1] < best[position][0]:
                        best[position] = held[-1], copy.deepcopy(head)
            validation_loss = sum(held) / len(held)
            history.append(
                {"step": epoch * -(-count // size), "loss": total / count, "validation_loss": validation_loss}
            )
    return nn.ModuleDict({position: best[position][1] for position in trials[0]}), history


def divergence(head: nn.Module, position: str, seen: Read, rows: Tensor | slice = slice(None)) -> Tensor:
    """The mean divergence of what a head says of some texts from what the model says."""
    said = head(seen.of(head, int(position))[rows]).log_softmax(-1)
    return functional.kl_div(said, seen.logits[rows].log_softmax(-1), reduction="batchmean", log_target=True)
