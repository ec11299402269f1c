"""The shape of a task, of its data and of what a model gives back for it. No torch at import."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from layershare.tasks.encoding import INPUTS, pad, token_counts

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn


@dataclass(frozen=True)
class Data:
    """The data of one run: three splits with no text in common.

    Attributes:
        train, validation, test: ``datasets.Dataset`` whose columns are named by role (``text``,
            ``text_pair``, ``score``, ``label``, ``target``), whatever the file called them; None where there is no
            such split.
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


Axis = Literal["source", "target"]
"""What a sequence lies along: the tokens of the input, or those of the text that an encoder-decoder is to write."""


@dataclass(frozen=True)
class Outputs:
    """What a model says about one batch of B inputs of T tokens, and of targets of U tokens where there are any.

    Attributes:
        embedding: [B, d], unit length; or [B, 2, d], of an image and its text, so long that their products are the
            model's logits; None for tasks without one.
        logits: unnormalised; [B, classes], or one such entry (or several, for several questions) for each token
            ``along`` an axis; None for tasks without them.
        hidden_states: the embedding output, then the output of each layer, each [B, T, d]; those of a decoder behind
            its encoder's, without its embedding output, are [B, U, d]; empty unless asked for.
        mask: [B, T], 1 where there is a real token; None where every input has equally many and all count.
        target_mask: [B, U], the same of the target; None without one.
        along: whose tokens the logits belong to; None: to the whole input.
        encoder: so many of the layers are an encoder's, in front of a decoder; None where there is but one.
        blank: the class that means nothing where logits spell a text that they are not aligned with (CTC); else None.
        values: [B, N, d], numbers that the model gives: boxes, pixels; None for tasks without them.
        value_weights: [B, N], how much each of these counts; None: all alike.
        loss: what the model itself makes of the true labels that it was given, a scalar, where it does not follow from
            the logits; see :func:`own_loss`.
    """

    embedding: "Tensor | None"
    logits: "Tensor | None"
    hidden_states: "tuple[Tensor, ...]"
    mask: "Tensor | None"
    target_mask: "Tensor | None" = None
    along: Axis | None = None
    encoder: int | None = None
    blank: int | None = None
    values: "Tensor | None" = None
    value_weights: "Tensor | None" = None
    loss: "Tensor | None" = None

    def axis(self, layer: int) -> Axis:
        """Along what the hidden states of a layer lie; positions count from 0, through encoder and decoder."""
        return "source" if self.encoder is None or layer < self.encoder else "target"

    def mask_of(self, axis: Axis | None) -> "Tensor | None":
        """Where there are real tokens along an axis; None: everywhere."""
        return self.mask if axis == "source" else self.target_mask if axis == "target" else None


Paths = Any
"""Files, a data set of the hub, or a ``datasets`` object; or a list of them. See :mod:`layershare.tasks.sources`."""


class _Read(Protocol):
    def __call__(
        self,
        paths: Paths,
        *,
        test: Paths = (),
        validation: Paths = (),
        columns: Mapping[str, str] | None = None,
        split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        skip_bad: bool = False,
    ) -> Data: ...


class _Encode(Protocol):
    def __call__(
        self, processor: Any, dataset: "Dataset", max_length: int, config: Any = None, /
    ) -> "Dataset": ...


class _Collate(Protocol):
    def __call__(self, processor: Any, rows: Sequence[Mapping[str, Any]], /) -> "dict[str, Tensor]": ...


class _Counts(Protocol):
    def __call__(self, rows: Any, config: Any = None) -> Mapping[Axis, Sequence[int]]: ...


class _Loss(Protocol):
    def __call__(self, outputs: Outputs, labels: Any) -> "Tensor": ...


class _Texts(Protocol):
    def __call__(self, data: Data) -> list[str]: ...


class _Check(Protocol):
    def __call__(self, data: Data, config: Any) -> None: ...


class _Forward(Protocol):
    def __call__(
        self, model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False
    ) -> Outputs: ...


class Evaluate(Protocol):
    """See :class:`Task`."""

    def __call__(
        self,
        model: Any,
        processor: Any,
        dataset: "Dataset",
        /,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        teacher: Any = None,
    ) -> dict[str, float]: ...


class _MetricOf(Protocol):
    def __call__(self, dataset: "Dataset") -> str: ...


def label_loss(outputs: Outputs, labels: "Tensor") -> "Tensor":
    """The loss of the true labels by their kind, see :func:`layershare.heal.losses.label_ce`."""
    from layershare.heal.losses import label_ce

    assert outputs.logits is not None
    return label_ce(outputs.logits.float(), labels)


def no_texts(data: Data) -> list[str]:  # noqa: ARG001 - as for every task
    """None: what such models read is no text that two parts must not share."""
    return []


def own_loss(outputs: Outputs, labels: Any) -> "Tensor":  # noqa: ARG001 - as for every task
    """The loss of a task whose models compute it themselves: ``forward`` gets the ``labels`` too when it is wanted."""
    assert outputs.loss is not None
    return outputs.loss


@dataclass(frozen=True)
class Task:
    """One kind of model, as data and functions. What has a default is that of a model of texts.

    Attributes:
        name: as the command line spells it.
        auto_class: the class in transformers that loads such a model; where there are several, for models of different
            types, their names with ``|`` between them.
        processor: the class in transformers that loads what goes before it: a tokenizer, an image processor, a feature
            extractor, or several in one. It is what ``encode``, ``collate`` and ``evaluate`` get as ``tokenizer``.
        unit: what one input is, in a word.
        metric: the headline figure when the data has its labels; ``metric_of`` says which one a dataset
            allows.
        higher_is_better: the sense of ``metric``.
        columns: role -> the column names it is guessed from, best first.
        optional: the roles that a file may lack.
        read: files -> Data. ``test`` names files that are only tested on, ``validation`` files that are only chosen
            on; a part without files is split off from the rows, seeded, by the fractions ``split`` (train,
            validation, test). No text is in two parts. Raises DataError naming file, line and column; with
            ``skip_bad`` a row that cannot be read is left out, and the notes count them.
        encode: a split -> a Dataset of ``inputs`` to train on, one row a text, cut at ``max_length`` tokens; of images
            and sounds, rows that tell where they are. Given a
            model's ``config``, and where the data has them, also ``labels``: aligned with the logits, -100 (NaN
            among numbers) where there is none.
        texts: the different training texts of Data, in file order.
        check: raises DataError where a model with this config cannot serve the data (its labels differ).
        forward: a padded batch of ``inputs`` -> Outputs. Extra keys in the batch are refused by the model.
        evaluate: figures on a split, no gradients, model left in the mode it was in. With ``teacher`` also
            ``agreement``, how far the two models say the same, which needs no labels.
        metric_of: the headline figure that ``evaluate`` can give for this dataset.
        inputs: the names in a batch that ``forward`` takes.
        collate: rows of ``encode`` -> a padded batch of ``inputs``, and ``labels`` where the rows have them. Only here
            are images and sounds opened.
        counts: rows of ``encode`` -> axis -> how many tokens of it each row has; given a config, how many hidden states
            its model makes of them. An axis that is left out has equally many in every row.
        loss: (Outputs, labels of the batch) -> the mean loss of the true labels, a scalar.
        terms: the terms of the loss of distillation that such a model has, beside those of its hidden states; see
            :class:`~layershare.heal.config.LossWeights`.
        varied: like ``collate``, of rows with their ``position`` in a run of training from which follows what is drawn
            anew each time; None: as ``collate``.
        learns: whether ``encode`` can give labels, so that a model can be trained on them.
        self_supervised: the rows themselves are what is to be learnt, by the model's own loss, and need no label. Then
            ``encode`` always gets the config.
        head: Data -> the keys of a config for a new head that answers with the labels of the data; None where a model
            has no such head.
        fresh: a config -> the processor of a model that is made from this config alone; None where that takes training.
        begin: gives a model that was made from nothing what its class leaves undone; None where that is nothing.
        configure: settings, as a task takes them -> the task with these settings; None for a task without any.
        settings: those that differ from the defaults, JSON-ready; with the name they say which task it is.
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
    evaluate: Evaluate
    metric_of: _MetricOf
    processor: str = "AutoTokenizer"
    unit: str = "text"
    inputs: tuple[str, ...] = INPUTS
    collate: _Collate = pad
    counts: _Counts = token_counts
    loss: _Loss = label_loss
    terms: tuple[str, ...] = ("logits", "labels")
    varied: _Collate | None = None
    learns: bool = False
    self_supervised: bool = False
    head: Callable[[Data], dict[str, Any]] | None = None
    fresh: Callable[[Any], Any] | None = None
    begin: Callable[[Any], None] | None = None
    configure: "Callable[[Mapping[str, Any]], Task] | None" = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def given(self, batch: Mapping[str, Any], *, learning: bool = False) -> dict[str, Any]:
        """What ``forward`` takes of a batch; ``learning``: also what :attr:`loss` will need."""
        names = (*self.inputs, "labels") if learning and self.loss is own_loss else self.inputs
        return {name: batch[name] for name in dict.fromkeys(names) if name in batch}
