"""prune: from a model and a PruneConfig to a smaller or sparser model."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from layershare.errors import DataError, OptionError
from layershare.prune import cutting, positions, structured, unstructured
from layershare.prune.config import PruneConfig
from layershare.prune.importance import Batch, Loss, label_loss, matching_loss
from layershare.prune.masks import MARK, sparsity, stacks_of
from layershare.sharing.carry import plan_of
from layershare.sharing.layout import find
from layershare.sharing.tie import count, verify


@dataclass(frozen=True)
class Account:
    """What a pruned model is, beside what it was. All counts are of stored parameters, each shared one once."""

    positions: tuple[tuple[str, int, int], ...]
    """(stack, before, after)."""
    sizes: Mapping[str, tuple[Any, Any]]
    """Config fields that changed: before and after."""
    unique_before: int
    unique: int
    zeros: int
    weights: int
    """Of ``weights`` weights in the layers' matrices, ``zeros`` are zero."""
    tied: int
    """Shared parameters, verified; 0 for a model without a plan."""

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction of the weights in the layers' matrices."""
        return self.zeros / self.weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        own = {
            "positions": [list(p) for p in self.positions],
            "sizes": {k: list(v) for k, v in self.sizes.items()},
        }
        return vars(self) | own | {"sparsity": self.sparsity}

    def __str__(self) -> str:
        lines = [
            f"{name}: {after} of {before} positions"
            for name, before, after in self.positions
            if before != after
        ]
        lines += [f"{field}: {before} -> {after}" for field, (before, after) in self.sizes.items()]
        share = f"{self.unique / self.unique_before:.1%}"
        lines.append(f"The model stores {self.unique:,} of {self.unique_before:,} parameters ({share}).")
        if self.zeros:
            share = f"{self.zeros:,} of {self.weights:,} stored weights of the layers are zero ({self.sparsity:.1%})."
            lines += [
                share,
                "Zeros alone save neither bytes nor time: that takes a sparse format and its runtime.",
            ]
        if self.tied:
            lines.append(f"{self.tied} shared parameters, ties verified.")
        return "\n".join(lines)


def prune(
    model: PreTrainedModel,
    config: PruneConfig,
    batches: Iterable[Batch] | None = None,
    *,
    loss: Loss | None = None,
    teacher: PreTrainedModel | None = None,
    alpha: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """A new model, pruned as ``config`` says; ``model`` is untouched. What was shared is shared afterwards, verified.

    Positions, heads and neurons are removed: the result is a plain model of the same class with other numbers in its
    config, and has fewer FLOPs. Every position keeps equally many; where weights are shared, importances are summed
    over the positions and the same units go everywhere. Heads with a common key and value go together. The cut model is
    run beside the old one with the units silenced, on the first batch or on inputs made up for it, before it is
    returned. Weights (and with ``keep_shape`` heads and neurons) become zero; :func:`held` keeps them so in training.

    Args:
        batches: dicts of tensors, given to the model as ``model(**batch)``. Every importance but magnitude needs them.
            A two-dimensional ``attention_mask`` tells padding, which is not counted.
        loss: for ``taylor``: (model, batch) -> scalar. Default: the output matched to ``teacher``, or else the model's
            own loss on the ``labels`` in the batches.
        teacher: the original of a shared model, to match outputs with; no labels are needed.
        alpha: for weights: an importance by name of the stored matrix, instead of ``config.by``; a tensor of its shape
            or a single number. The energy of a weight is then ``alpha * w^2``.

    Raises:
        OptionError: an amount that cuts all or nothing, inputs that N:M does not divide, a missing loss.
        ModelError: the architecture has no such units, or cannot have fewer of them.
        DataError: no batches, or some that do not reach every part.
        PlanError: a stack that is not there, or a sharing plan that does not suit what is left.
    """
    _refuse_read_keys(model, config)
    stacks = stacks_of(model)
    if config.stacks is not None:
        stacks = tuple(find(stacks, name) for name in config.stacks)
    given: Sequence[Batch] = list(batches) if batches is not None else []
    if config.needs_batches and not given and alpha is None:
        raise DataError(
            f"importance {config.by!r} is measured on data.", "Give batches, or prune by magnitude."
        )
    if alpha is not None and config.what != "weights":
        raise OptionError("alpha is the importance of single weights (what = 'weights').")
    loss = loss or (matching_loss(teacher.eval()) if teacher is not None else label_loss)
    if config.what == "positions":
        new = positions.drop(model, positions.choose(model, config, stacks, given, loss))
    elif config.what == "weights":
        chosen = unstructured.targets(model, stacks, config.parts)
        found = unstructured.scores(model, chosen, config.by, given, loss, alpha)
        new = unstructured.zero(model, unstructured.select(found, chosen, config))
        _mark(new, config)
    else:
        choice, inputs = structured.choose(model, config, stacks, given, loss)
        if config.keep_shape:
            new = cutting.zero(model, choice)
            _mark(new, config)
        else:
            new = cutting.cut(model, choice)
            cutting.prove(model, new, choice, inputs)
    if plan_of(new) is not None:
        verify(new)
    return new


def _refuse_read_keys(model: PreTrainedModel, config: PruneConfig) -> None:
    """A position that others read keys and values from cannot go, nor can its heads."""
    plan = plan_of(model)
    if config.what in ("positions", "heads") and plan and any(g.kv for s in plan.stacks for g in s.groups):
        raise OptionError(
            f"the model's plan has kv = true: its {config.what} cannot be pruned.",
            "Prune neurons or weights.",
        )


def _mark(model: PreTrainedModel, config: PruneConfig) -> None:
    before = getattr(model.config, MARK, None) or {}
    record = config.model_dump(mode="json", exclude_defaults=True, exclude={"what"})
    setattr(model.config, MARK, copy.deepcopy(before) | {config.what: record})


def account(before: PreTrainedModel, after: PreTrainedModel) -> Account:
    """What ``prune`` made of ``before``. Raises TieError if a tie came apart."""
    old, new = before.config.to_dict(), after.config.to_dict()
    hidden = {MARK, "quantization_config", "transformers_weights", "dtype", "architectures"}
    sizes = {k: (old.get(k), v) for k, v in new.items() if k not in hidden and old.get(k) != v}
    stacks = stacks_of(before)
    lengths = {stack.name: len(list(after.get_submodule(stack.name).children())) for stack in stacks}
    zeros, weights = sparsity(after, lengths)
    return Account(
        positions=tuple((stack.name, stack.length, lengths[stack.name]) for stack in stacks),
        sizes=sizes,
        unique_before=count(before).unique,
        unique=count(after).unique,
        zeros=zeros,
        weights=weights,
        tied=verify(after).tied if plan_of(after) is not None else 0,
    )
