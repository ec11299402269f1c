"""Every error that layershare raises on purpose.

::

    LayershareError
    ├── OptionError      an option, a recipe key or an argument has a wrong value
    ├── PlanError        a sharing plan is wrong in itself, or does not fit the model
    ├── ModelError       the model cannot be loaded, or has no repeated layers
    ├── DataError        a data file is missing, empty, broken or has the wrong columns
    ├── TieError         parameters that should be one object are not
    ├── StoreError       a model folder is missing, incomplete, from a newer version or in the way
    ├── TrainingError    training cannot go on (the loss is not a number, nothing to train)
    └── DependencyError  an optional package is needed for what was asked

The message names what the user gave; ``hint`` says what to do next. The command line prints both in one line and
exits with code 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LayershareError(Exception):
    """Base of all; ``str(error)`` is the message followed by the hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple:
        return type(self), (self.message, self.hint)


class OptionError(LayershareError):
    """An option, a recipe key or an argument has a wrong value."""


class PlanError(LayershareError):
    """A sharing plan is wrong in itself, or does not fit the model."""


class ModelError(LayershareError):
    """The model cannot be loaded, or has no repeated layers."""


class DataError(LayershareError):
    """A data file is missing, empty, broken or has the wrong columns."""


class TieError(LayershareError):
    """Parameters that should be one object are not."""


class StoreError(LayershareError):
    """A model folder is missing, incomplete, from a newer version or in the way."""


class TrainingError(LayershareError):
    """Training cannot go on."""


class DependencyError(LayershareError):
    """An optional package is needed for what was asked."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint that names the valid word most like ``word``, or else all of them."""
    valid = list(valid)
    close = get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Valid: {', '.join(valid)}."
