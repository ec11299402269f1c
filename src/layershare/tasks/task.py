"""The shape of a task, of its data and of what a model gives back for it. No torch at import."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn


@dataclass(frozen=True)
class Data:
    """The data of one run: three splits with no text in common.

    Attributes:
        train, validation, test: ``datasets.Dataset`` whose columns are named by role (``text``,
            ``text_pair``, ``score``, ``label``), whatever the file called them; None where there is no such
            split.
        columns: role -> the column of the file that was taken for it.
        sha256: file name as given -> SHA-256 of its bytes.
        labels: the label names found, sorted (classification only).
        notes: sentences for the user about choices made on his behalf, for example rows left out.
    """

    train: "Dataset | None"
    validation: "Dataset | None"
    test: "Dataset | None"
    columns: Mapping[str, str]
    sha256: Mapping[str, str]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files read, in order."""
        return tuple(self.sha256)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows in each split; 0 for a split that does not exist."""
        return {name: len(part or ()) for name, part in self.splits.items()}

    @property
    def splits(self) -> dict[str, "Dataset | None"]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def describe(self) -> dict[str, Any]:
        """What a Result records about the data: files and their hashes, sizes, columns, notes. JSON-ready."""
        return {
            "files": dict(self.sha256),
            "sizes": self.sizes,
            "columns": dict(self.columns),
            "labels": list(self.labels),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Outputs:
    """What a model says about one batch of B texts of T tokens.

    Attributes:
        embedding: [B, d], unit length; None for tasks without one.
        logits: [B, classes], unnormalised; None for tasks without them.
        hidden_states: the embedding output, then the output of each layer, each [B, T, d]; empty unless
            asked for.
        mask: [B, T], 1 where there is a real token.
    """

    embedding: "Tensor | None"
    logits: "Tensor | None"
    hidden_states: "tuple[Tensor, ...]"
    mask: "Tensor"


class _Read(Protocol):
    def __call__(
        self,
        paths: Sequence[str | Path] | str | Path,
        *,
        test: Sequence[str | Path] | str | Path = (),
        validation: Sequence[str | Path] | str | Path = (),
        columns: Mapping[str, str] | None = None,
        split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
    ) -> Data: ...


class _Encode(Protocol):
    def __call__(self, tokenizer: Any, dataset: "Dataset", max_length: int) -> "Dataset": ...


class _Texts(Protocol):
    def __call__(self, data: Data) -> list[str]: ...


class _Check(Protocol):
    def __call__(self, data: Data, config: Any) -> None: ...


class _Forward(Protocol):
    def __call__(
        self, model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False
    ) -> Outputs: ...


class _Evaluate(Protocol):
    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        dataset: "Dataset",
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        teacher: Any = None,
    ) -> dict[str, float]: ...


class _MetricOf(Protocol):
    def __call__(self, dataset: "Dataset") -> str: ...


@dataclass(frozen=True)
class Task:
    """One kind of model, as data and seven functions.

    Attributes:
        name: as the command line spells it.
        auto_class: the class in transformers that loads such a model.
        metric: the headline figure when the data has its labels; ``metric_of`` says which one a dataset
            allows.
        higher_is_better: the sense of ``metric``.
        columns: role -> the column names it is guessed from, best first.
        optional: the roles that a file may lack.
        read: files -> Data. ``test`` names files that are only tested on, ``validation`` files that are only chosen
            on; a part without files is split off from the rows, seeded, by the fractions ``split`` (train,
            validation, test). No text is in two parts. Raises DataError naming file, line and column.
        encode: a split -> a Dataset of ``input_ids`` ... to train on, one row a text, cut at ``max_length``
            tokens.
        texts: the different training texts of Data, in file order.
        check: raises DataError where a model with this config cannot serve the data (its labels differ).
        forward: a padded batch of tensors -> Outputs. Extra keys in the batch are refused by the model.
        evaluate: figures on a split, no gradients, model left in the mode it was in. With ``teacher`` also
            ``agreement``, how far the two models say the same, which needs no labels.
        metric_of: the headline figure that ``evaluate`` can give for this dataset.
    """

    name: str
    auto_class: str
    metric: str
    higher_is_better: bool
    columns: Mapping[str, tuple[str, ...]]
    optional: frozenset[str]
    read: _Read
    encode: _Encode
    texts: _Texts
    check: _Check
    forward: _Forward
    evaluate: _Evaluate
    metric_of: _MetricOf
