"""A classifier that stops at the first exit that is sure.  (BranchyNet, Teerapittayanon et al., 2016, arXiv 1709.01686;
DeeBERT, Xin et al., 2020, arXiv 2004.12993.)"""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from layershare.exits.head import Thresholds, confidence, threshold_at
from layershare.exits.tail import Tail, find_tail, states_of, tensors, with_states


@dataclass
class EarlyExitOutput(SequenceClassifierOutput):
    """``logits`` [B, classes], and ``positions`` [B]: the last position that ran for each text, counted from 0."""

    positions: Tensor | None = None


class EarlyExit(nn.Module):
    """A classifier with exits, for inference: call it as the model itself.

    Texts leave behind the first position whose head is at least ``threshold`` sure, and the batch goes on without
    them. With a threshold above 1 nothing leaves, and the answers are the model's own, to the bit. The model is not
    changed; called directly it runs in full depth.

    Args:
        model: a classifier of whole texts, one label each.
        heads: position -> head, as :func:`layershare.exits.head.new_heads` makes them.
        threshold: the least probability of the likeliest class to leave with.
        tail: as :func:`layershare.exits.tail.find_tail` finds it.
    """

    def __init__(
        self, model: Any, heads: nn.ModuleDict, threshold: Thresholds, tail: Tail | None = None
    ) -> None:
        super().__init__()
        self.model, self.heads, self.threshold = model, heads, threshold
        self.tail = find_tail(model) if tail is None else tail
        stack = self.tail.stack
        for position in range(stack.length):
            layer = model.get_submodule(f"{stack.name}.{position}")
            if position and self.tail.rows[position]:
                layer.register_forward_pre_hook(partial(_narrow, self.tail.rows[position]), with_kwargs=True)
            if str(position) in heads or position == stack.length - 1:
                layer.register_forward_hook(partial(_leave, position, position == stack.length - 1))
        self.eval()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def positions(self) -> tuple[int, ...]:
        """Behind which positions there are exits, the last one left out."""
        return tuple(map(int, self.heads))

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """Logits, as the model takes its inputs. ``output_hidden_states`` and such are not for early exits."""
        inputs = {name: value for name, value in inputs.items() if not name.startswith("output_") or value}
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pad = getattr(self.config, "pad_token_id", None)
        if attention_mask is None and pad is not None and self.tail.pooling == "last":
            mask = (input_ids != pad).long()  # where the model itself looks
        run = _Run(self, mask)
        token = _RUN.set(run)
        try:
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
            run.answer(out.logits[run.rows], self.tail.stack.length - 1)
        except _Done:
            pass
        finally:
            _RUN.reset(token)
        assert run.logits is not None
        return EarlyExitOutput(logits=run.logits, positions=run.positions)


class _Done(BaseException):
    """Every text has left. No Exception, lest a model take it for a failure of its own."""


class _Run:
    """One batch on its way: which of its rows are still there, and what was said of the others."""

    def __init__(self, owner: EarlyExit, mask: Tensor) -> None:
        self.owner, self.mask = owner, mask
        self.size = len(mask)
        self.rows = torch.arange(self.size, device=mask.device)
        self.logits: Tensor | None = None
        self.positions = torch.zeros_like(self.rows)

    def answer(self, logits: Tensor, position: int, among: Tensor | None = None) -> None:
        """Keep the logits of the rows that are there (``among``: those of them)."""
        rows = self.rows if among is None else self.rows[among]
        if self.logits is None:
            self.logits = logits.new_zeros(self.size, logits.shape[-1])
        self.logits[rows] = logits
        self.positions[rows] = position

    def exit(self, states: Tensor, position: int) -> Tensor | None:
        """The rows that stay, None for all of them; raises _Done where none does."""
        head: Any = self.owner.heads[str(position)]
        logits = head(self.owner.tail.pooled(states, self.mask, head.pooling))
        sure = confidence(logits) >= threshold_at(self.owner.threshold, position)
        if not sure.any():
            return None
        self.answer(logits[sure], position, sure)
        if sure.all():
            raise _Done
        stay = ~sure
        self.rows, self.mask = self.rows[stay], self.mask[stay]
        return stay


# What runs now, in this thread: the hooks are on the layers for good, and do nothing in any other run.
_RUN: ContextVar[_Run | None] = ContextVar("early exit", default=None)


def _leave(position: int, is_last: bool, _: nn.Module, __: tuple, output: Any) -> Any:
    run = _RUN.get()
    if run is None:
        return output
    states = states_of(output)
    if not is_last:
        stay = run.exit(states, position)
        return output if stay is None else with_states(output, states[stay])
    if len(states) == run.size:
        return output
    # What comes behind the layers sees the whole batch again; for those that left, nothing reads it.
    whole = states.new_zeros(run.size, *states.shape[1:])
    whole[run.rows] = states
    return with_states(output, whole)


def _narrow(paths: Iterable[tuple], _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Masks and such, which the model made for the whole batch, for the rows that are there."""
    run = _RUN.get()
    if run is None or len(run.rows) == run.size:
        return None
    chosen = {path for path, one in tensors(args, kwargs) if path in paths and len(one) == run.size}
    return _pick((), args, chosen, run.rows), _pick((), kwargs, chosen, run.rows)


def _pick(path: tuple, value: Any, chosen: set[tuple], rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if path in chosen else value
    if isinstance(value, tuple | list):
        return type(value)(_pick((*path, i), one, chosen, rows) for i, one in enumerate(value))
    if isinstance(value, dict):
        return {key: _pick((*path, key), one, chosen, rows) for key, one in value.items()}
    return value
