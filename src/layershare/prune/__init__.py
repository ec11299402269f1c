"""Pruning that knows of shared weights: positions, heads, neurons, single weights."""

# First, because its import brings in layershare.store, which needs the sharing room: see layershare/__init__.py.
import layershare.sharing  # noqa: F401
from layershare.prune.config import PruneConfig
from layershare.prune.importance import label_loss, matching_loss
from layershare.prune.masks import held, masks_of, sparsity
from layershare.prune.verb import Account, account, prune

__all__ = [
    "Account",
    "PruneConfig",
    "account",
    "held",
    "label_loss",
    "masks_of",
    "matching_loss",
    "prune",
    "sparsity",
]
