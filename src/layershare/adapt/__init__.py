"""Adapting: small trained modules on a frozen model, shared or not, as PEFT adapters.

``adapt`` adds them, ``fit`` or ``match`` trains them, ``model.save_pretrained`` writes a PEFT adapter folder, which
``peft.PeftModel.from_pretrained`` (after ``import layershare``) or ``load`` reads back. ``merge`` puts linear ones
into an unshared copy; PEFT's own ``merge_and_unload`` is refused on shared weights, see ``layershare/adapt/guard.py``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layershare.adapt.config import AdaptConfig
    from layershare.adapt.matching import MatchConfig, match, output_matching
    from layershare.adapt.merging import merge
    from layershare.adapt.methods import adapt, load
    from layershare.adapt.trainable import fit

# Loaded on first use: `import peft` brings in guard.py of this room, and should not bring in all of training.
_HOMES = {
    "AdaptConfig": "config",
    "MatchConfig": "matching",
    "adapt": "methods",
    "fit": "trainable",
    "load": "methods",
    "match": "matching",
    "merge": "merging",
    "output_matching": "matching",
}
__all__ = [
    "AdaptConfig",
    "MatchConfig",
    "adapt",
    "fit",
    "load",
    "match",
    "merge",
    "output_matching",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layershare.adapt' has no attribute {name!r}")
    return getattr(import_module(f"layershare.adapt.{_HOMES[name]}"), name)
