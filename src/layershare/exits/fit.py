"""Train the heads. The layers are frozen, so what a head reads is computed once for each text."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layershare.exits.config import ExitsConfig
from layershare.exits.tail import Tail, states_of
from layershare.tasks.encoding import INPUTS, batches


@dataclass(frozen=True)
class Read:
    """What is known of N texts: ``pooled`` [E, N, d], what the heads read, and the model's ``logits`` [N, classes]."""

    pooled: Tensor
    logits: Tensor


@torch.no_grad()
def read(
    model: Any, tail: Tail, positions: Sequence[int], tokenizer: Any, rows: Mapping[str, Sequence[Any]],
    batch_size: int = 64,
) -> Read:  # fmt: skip
    """Run the model over encoded texts (columns of token ids), in full depth, and keep what its exits would read."""
    columns = {name: rows[name][:] for name in INPUTS if name in rows}
    count = len(columns["input_ids"])
    pooled: list[list[Tensor]] = []
    mask: list[Tensor] = [torch.empty(0)]

    def hook(_: nn.Module, __: tuple, output: Any) -> None:
        pooled[-1].append(tail.pooled(states_of(output), mask[0]).float())

    handles = [model.get_submodule(f"{tail.stack.name}.{p}").register_forward_hook(hook) for p in positions]
    order: list[int] = []
    logits: list[Tensor] = []
    try:
        model.eval()
        for indices, batch in batches(tokenizer, columns, batch_size):
            pooled.append([])
            mask[0] = batch["attention_mask"]
            logits.append(model(**batch).logits.float())
            order += indices
    finally:
        for handle in handles:
            handle.remove()
    back = torch.empty(count, dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(count)
    return Read(torch.cat([torch.stack(part) for part in pooled], 1)[:, back], torch.cat(logits)[back])


def answers(heads: nn.ModuleDict, seen: Read) -> Tensor:
    """The logits of every exit, and last the model's own: [E + 1, N, classes]."""
    with torch.no_grad():
        said = [head(pooled).float() for head, pooled in zip(heads.values(), seen.pooled, strict=True)]
    return torch.stack([*said, seen.logits])


def fit(heads: nn.ModuleDict, train: Read, validation: Read, config: ExitsConfig) -> list[dict[str, Any]]:
    """Train ``heads``, in place, by the divergence of what they say from what the model says in the end.

    Each head keeps its weights of the epoch that was best on the validation texts. Returns a line for each epoch: the
    losses in training, and on the validation texts, both the mean over the heads.
    """
    heads.train()
    draw = torch.Generator().manual_seed(config.seed)
    count, size = len(train.logits), config.batch_size
    steps = config.epochs * -(-count // size)
    optimizer = torch.optim.AdamW(heads.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    best = {name: (float("inf"), copy.deepcopy(head.state_dict())) for name, head in heads.items()}
    history = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # dropout
        for epoch in range(1, config.epochs + 1):
            heads.train()
            total = 0.0
            for rows in torch.randperm(count, generator=draw).split(size):
                loss = divergences(heads, train.pooled[:, rows], train.logits[rows]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
            heads.eval()
            with torch.no_grad():
                held = divergences(heads, validation.pooled, validation.logits).tolist()
            for (name, head), loss_of in zip(heads.items(), held, strict=True):
                if loss_of < best[name][0]:
                    best[name] = loss_of, copy.deepcopy(head.state_dict())
            history.append(
                {
                    "step": epoch * -(-count // size),
                    "loss": total / count / len(heads),
                    "validation_loss": sum(held) / len(held),
                }
            )
    for name, head in heads.items():
        head.load_state_dict(best[name][1])
    return history


def divergences(heads: nn.ModuleDict, pooled: Tensor, logits: Tensor) -> Tensor:
    """The mean divergence from the model's answers [N, classes], of each head [E]."""
    aim = logits.log_softmax(-1)
    return torch.stack(
        [
            functional.kl_div(head(one).log_softmax(-1), aim, reduction="batchmean", log_target=True)
            for head, one in zip(heads.values(), pooled, strict=True)
        ]
    )
