"""What the language-modelling tasks have in common: reading, the loss, and judging by perplexity."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layershare.errors import DataError, OptionError
from layershare.tasks.corpus import COLUMNS, PARTS, read_corpus
from layershare.tasks.files import text
from layershare.tasks.packing import Frame
from layershare.tasks.reading import read_splits
from layershare.tasks.sources import is_file_name, listed
from layershare.tasks.task import Data, Outputs, Paths, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

LOGITS = 1 << 26
"""At most so many numbers in the logits of one batch that is judged (256 MB)."""


@dataclass(frozen=True)
class Words:
    """What is known of a vocabulary: sizes and special tokens, by id."""

    vocabulary: int
    special: np.ndarray
    mask: int | None
    end: int | None
    separator: int
    start: int | None
    sentinels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Guessing:
    """How much is to be guessed. ``separate``: attention stays inside each document (causal models only)."""

    rate: float = 0.15
    mean_span: float = 3.0
    separate: bool = False


@dataclass(frozen=True)
class Objective:
    """How a language model is trained and judged, as data and three functions.

    Attributes:
        task: the task it belongs to.
        tokenizer_kind: what is trained when no tokenizer is given.
        frame: tokenizer -> what stands around each block and between documents.
        check: raises where the tokenizer or a block size does not allow it.
        batch: blocks of one size, a generator for each -> tensors for the model and ``labels``, aligned with the
            logits, -100 where nothing is asked. Where the task has ``labels`` among its inputs the model reads them.
    """

    task: Task
    tokenizer_kind: Literal["byte-level BPE", "WordPiece"]
    frame: Callable[[Any], Frame]
    check: Callable[[Words, int, Guessing], None]
    batch: "Callable[[Sequence[Sequence[int]], Sequence[np.random.Generator], Words, Guessing], dict[str, Tensor]]"

    def inputs(self, batch: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """What of a batch the model is given."""
        return {name: value for name, value in batch.items() if name != "labels" or name in self.task.inputs}


def read_texts(
    paths: Paths,
    *,
    test: Paths = (),
    validation: Paths = (),
    columns: Mapping[str, str] | None = None,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    skip_bad: bool = False,
) -> Data:
    """Read documents, one a row, or in ``.txt`` files one a paragraph; see :mod:`layershare.tasks.corpus`.

    What is no file is read as other tables are, and so is everything with ``skip_bad``, which ``.txt`` files have not.
    """
    from datasets import Dataset

    sources = [*listed(paths), *listed(validation), *listed(test)]
    if skip_bad and (plain := [file for file in sources if str(file).endswith(".txt")]):
        raise OptionError(f"{plain[0]}: skip_bad is for rows of a table.", "Mend the file, or leave it out.")
    if skip_bad or not all(is_file_name(source) for source in sources):
        return read_splits(
            paths, candidates=COLUMNS, convert={"text": text}, test=test, validation=validation, columns=columns,
            split=split, seed=seed, skip_bad=skip_bad,
        )  # fmt: skip
    corpus = read_corpus(paths, validation=validation, test=test, columns=columns, split=split, seed=seed)
    parts: list[Any] = [
        Dataset.from_dict({"text": list(corpus.stream(part))}) if corpus.documents[part] else None
        for part in PARTS
    ]
    return Data(parts[0], parts[1], parts[2], corpus.columns, corpus.sha256, notes=corpus.notes)


def texts_of(data: Data) -> list[str]:
    """The different training documents, in file order."""
    return [] if data.train is None else list(dict.fromkeys(data.train["text"]))


def check_any(data: Data, config: Any) -> None:
    """Any text will do."""


def perplexity(dataset: "Dataset") -> str:  # noqa: ARG001 - the same call for every task
    """Always ``perplexity``: text needs no labels."""
    return "perplexity"


def words_of(tokenizer: Any, config: Any) -> Words:
    """What ``tokenizer`` and a model's ``config`` say of the vocabulary."""
    from layershare.tasks.packing import separator_of

    special = np.zeros(max(len(tokenizer), *(i + 1 for i in (*tokenizer.all_special_ids, 0))), dtype=bool)
    special[tokenizer.all_special_ids] = True
    known = tokenizer.get_vocab()
    sentinels: list[int] = []
    while (token := f"<extra_id_{len(sentinels)}>") in known:
        sentinels.append(known[token])
    special[sentinels] = True
    start = getattr(config, "decoder_start_token_id", None)
    return Words(
        vocabulary=len(tokenizer),
        special=special,
        mask=tokenizer.mask_token_id,
        end=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id,
        separator=separator_of(tokenizer),
        start=start if start is not None else getattr(config, "pad_token_id", None),
        sentinels=tuple(sentinels),
    )


def draws(seed: int, positions: Iterable[int]) -> list[np.random.Generator]:
    """A generator for each place in a run: what it draws follows from seed and place alone."""
    return [np.random.default_rng([seed, position]) for position in positions]


def forward_lm(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """Logits [B, T, vocabulary]."""
    import torch

    # With a cache transformers does not see from position_ids that documents are to be kept apart.
    flags = {"use_cache": False} if "position_ids" in batch else {}
    out = model(**batch, **flags, output_hidden_states=hidden_states)
    states = out.hidden_states if hidden_states else ()
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return Outputs(None, out.logits, states, mask, along="source")


def guess_loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """Mean cross-entropy, in nats, over the labels that are not -100. logits: [B, T, V], labels: [B, T]."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def judge(
    model: Any,
    blocks: Sequence[Sequence[int]],
    objective: Objective,
    words: Words,
    guessing: Guessing,
    *,
    batch_size: int = 64,
    teacher: Any = None,
) -> dict[str, float]:
    """``perplexity`` and ``accuracy`` of the guesses in ``blocks``; with ``teacher`` also ``agreement``.

    What is masked is drawn once and for all, so two models are asked the same. Perplexity is exp of the mean loss a
    guess; it compares models of one vocabulary and one objective only. Raises DataError when nothing can be asked.
    """
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, right, same, count = 0.0, 0, 0, 0
    try:
        with torch.no_grad():
            for rows, places in _alike(blocks, batch_size, words.vocabulary):
                batch = objective.batch(rows, draws(0, places), words, guessing)
                batch = {name: value.to(device) for name, value in batch.items()}
                labels, inputs = batch["labels"], objective.inputs(batch)
                asked = labels != -100
                logits = objective.task.forward(model, inputs).logits
                assert logits is not None
                logits = logits[asked].float()
                total += float(torch.nn.functional.cross_entropy(logits, labels[asked], reduction="sum"))
                guess = logits.argmax(-1)
                right += int((guess == labels[asked]).sum())
                count += int(asked.sum())
                if teacher is not None:
                    theirs = objective.task.forward(teacher, inputs).logits
                    assert theirs is not None
                    same += int((guess == theirs[asked].argmax(-1)).sum())
    finally:
        model.train(was_training)
    if not count:
        raise DataError("The text is too short to judge on.", "Give more.")
    figures = {"perplexity": math.exp(min(total / count, 700)), "accuracy": right / count}
    return figures | ({} if teacher is None else {"agreement": same / count})


def evaluator(objective: Callable[[], Objective]) -> Any:
    """``Task.evaluate`` for an objective."""

    def evaluate(
        model: Any,
        tokenizer: Any,
        dataset: "Dataset",
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        teacher: Any = None,
    ) -> dict[str, float]:
        """``perplexity`` and ``accuracy`` on packed blocks of at most ``max_length`` tokens, see :func:`judge`."""
        from layershare.tasks.encoding import usable_length
        from layershare.tasks.packing import pack

        aim, words, guessing = objective(), words_of(tokenizer, model.config), Guessing()
        size = usable_length(tokenizer, model.config, max_length)
        aim.check(words, size, guessing)
        blocks = pack(tokenizer, dataset["text"], aim.frame(tokenizer), size)
        return judge(model, blocks, aim, words, guessing, batch_size=batch_size, teacher=teacher)

    return evaluate


def language_task(
    name: str, auto_class: str, encode: Any, objective: Callable[[], Objective], **own: Any
) -> Task:
    """A task of running text, judged by perplexity. ``own``: what else it has of its own, or differs in."""
    common = {"read": read_texts, "texts": texts_of, "check": check_any, "forward": forward_lm}
    return Task(
        name=name,
        auto_class=auto_class,
        metric="perplexity",
        higher_is_better=False,
        columns=COLUMNS,
        optional=frozenset(),
        encode=encode,
        evaluate=evaluator(objective),
        metric_of=perplexity,
        **common | own,
    )


def _alike(
    blocks: Sequence[Sequence[int]], batch_size: int, vocabulary: int
) -> Iterator[tuple[list[Sequence[int]], list[int]]]:
    """Runs of blocks of one length, few enough for memory, with their numbers."""
    at = 0
    while at < len(blocks):
        length = len(blocks[at])
        most = max(1, min(batch_size, LOGITS // (length * vocabulary)))
        rows = [blocks[at]]
        while len(rows) < most and at + len(rows) < len(blocks) and len(blocks[at + len(rows)]) == length:
            rows.append(blocks[at + len(rows)])
        yield rows, list(range(at, at + len(rows)))
        at += len(rows)
