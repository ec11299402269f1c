"""PruneConfig: what is cut, how much of it, and by which importance. No torch."""

import re
from typing import Literal, Self

from pydantic import Field, StrictFloat, StrictInt, model_validator

from layershare.config import Config

What = Literal["positions", "heads", "neurons", "weights"]
By = Literal["magnitude", "taylor", "activation", "influence", "wanda"]

IMPORTANCES: dict[str, tuple[str, ...]] = {
    "positions": ("magnitude", "taylor", "activation", "influence"),
    "heads": ("magnitude", "taylor", "activation"),
    "neurons": ("magnitude", "taylor", "activation"),
    "weights": ("magnitude", "taylor", "wanda"),
}
"""Which importances each kind of unit has."""


class PruneConfig(Config):
    """One cut. Whole positions, attention heads or FFN neurons go for good; single weights become zero."""

    what: What = Field(description="The unit: positions, heads, neurons or weights.")
    amount: StrictInt | StrictFloat | None = Field(
        None,
        description="A fraction between 0 and 1, or a whole number: positions of each stack, heads or neurons of each "
        "block, weights of the model (each shared one counted once).",
    )
    by: By = Field(
        "magnitude",
        description="Importance: magnitude (size of the weights), taylor (first-order change of the loss), activation "
        "(size of what passes), influence (how far a position turns its input; positions only), wanda (size of the "
        "weight times size of its input; weights only).",
    )
    stacks: tuple[str, ...] | None = Field(None, description="Names of the stacks to prune; default all.")
    protect: tuple[int, ...] = Field((), description="Positions that are never dropped (what = positions).")
    multiple: int = Field(1, ge=1, description="Keep a multiple of this many neurons a block, rounding up.")
    keep_shape: bool = Field(
        False,
        description="Zero the heads or neurons instead of removing them. Nothing gets faster or smaller; it is for "
        "architectures that cannot have fewer heads of the same size (BERT, GPT-2).",
    )
    parts: tuple[str, ...] = Field(
        ("attention", "ffn", "other"),
        description="Parts whose matrices lose weights, or globs (what = weights).",
    )
    scope: Literal["global", "layer", "row"] = Field(
        "global",
        description="Among which weights the least important are sought: all of them, each matrix, or each row of it "
        "(one output; Wanda's own choice).",
    )
    pattern: str | None = Field(
        None, description="N:M, as 2:4: N of every M neighbouring inputs of an output stay (what = weights)."
    )
    threshold: float | None = Field(
        None, gt=0, description="Energy form: zero the most weights whose sum of alpha * w^2 stays within it."
    )
    relative: bool = Field(False, description="The threshold is a fraction of the total energy.")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.by not in IMPORTANCES[self.what]:
            raise ValueError(
                f"{self.what} have no importance {self.by!r}: {', '.join(IMPORTANCES[self.what])}"
            )
        if isinstance(self.amount, float) and not 0 < self.amount < 1:
            raise ValueError(
                f"amount {self.amount:g} is no fraction between 0 and 1; whole numbers are counts"
            )
        if isinstance(self.amount, int) and self.amount < 1:
            raise ValueError(f"amount {self.amount} cuts nothing")
        ways = [name for name in ("amount", "pattern", "threshold") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError(f"give one of amount, pattern, threshold (given: {', '.join(ways) or 'none'})")
        if self.what != "weights" and ways != ["amount"]:
            raise ValueError(f"{ways[0]} is for weights, {self.what} need an amount")
        if self.keep_shape and self.what not in ("heads", "neurons"):
            raise ValueError("keep_shape is for heads and neurons")
        if self.pattern is not None:
            n, m = self.n_of_m
            if not 0 < n < m:
                raise ValueError(
                    f"pattern {self.pattern} does not keep at least 1 and fewer than all of {m} weights"
                )
        if self.scope != "global" and (self.what != "weights" or self.amount is None):
            raise ValueError("scope goes with what = weights and an amount")
        if self.scope != "global" and isinstance(self.amount, int):
            raise ValueError(
                f"a number of weights is counted over all of them; scope {self.scope!r} needs a fraction"
            )
        if self.relative and (self.threshold is None or self.threshold >= 1):
            raise ValueError("relative needs a threshold below 1")
        return self

    @property
    def n_of_m(self) -> tuple[int, int]:
        """(N, M) of the pattern."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern or "")
        if found is None:
            raise ValueError(f"pattern {self.pattern!r} is not N:M, as 2:4")
        return int(found[1]), int(found[2])

    @property
    def needs_batches(self) -> bool:
        """Whether the importance is measured on data."""
        return self.by != "magnitude"

    def removed_of(self, units: int) -> int:
        """How many of ``units`` go; a fraction is rounded down, and so is the cut that ``multiple`` would exceed."""
        assert self.amount is not None
        wanted = self.amount if isinstance(self.amount, int) else int(self.amount * units + 1e-9)
        return (
            max(units - -(-(units - wanted) // self.multiple) * self.multiple, 0)
            if wanted < units
            else wanted
        )
