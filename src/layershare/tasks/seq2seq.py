"""What translation and summarisation have in common: pairs of texts, read by an encoder and written by a decoder.

Training and distillation force the decoder: it is asked for each token of the target given the true ones before it.
The start token and the shift are the model's own: ``labels`` go into its forward. Judging lets it write by itself,
with ``generate``, as the user sets it. Hidden states are those of the encoder, then those of the decoder, see
:class:`~layershare.tasks.task.Outputs`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from layershare.errors import DependencyError, ModelError
from layershare.tasks.encoding import batches, encode, pad, usable_length
from layershare.tasks.files import text
from layershare.tasks.language import LOGITS
from layershare.tasks.masking import IGNORED
from layershare.tasks.reading import read_splits
from layershare.tasks.task import Data, Outputs, Task
from layershare.tasks.writing import Targets, generate

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

INPUTS = ("input_ids", "attention_mask", "labels")
Measure = Callable[[Sequence[str], Sequence[str]], dict[str, float]]
"""(what the model wrote, what is right) -> figures."""


class Settings(Targets):
    """How texts are given to the model, and how it writes."""

    prefix: str = Field(
        "", description="Put before every text, as T5 wants it: 'translate English to German: '."
    )


def make(
    name: str,
    columns: Mapping[str, tuple[str, ...]],
    metric: str,
    settings: Settings,
    measure: Measure,
    configure: Callable[[Mapping[str, Any]], Task],
) -> Task:
    """The task of this name with these settings. ``columns``: for ``text`` and ``target``."""
    return Task(
        name=name,
        auto_class="AutoModelForSeq2SeqLM",
        metric=metric,
        higher_is_better=True,
        columns=columns,
        optional=frozenset(),
        read=partial(read_splits, candidates=columns, convert={"text": text, "target": text}),
        encode=partial(_encode, settings),
        texts=texts,
        check=check,
        forward=forward,
        evaluate=partial(_evaluate, settings, measure),
        metric_of=lambda dataset: metric,  # noqa: ARG005 - the same call for every task
        inputs=INPUTS,
        collate=collate,
        counts=counts,
        learns=True,
        configure=configure,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
    )


def texts(data: Data) -> list[str]:
    """The different training texts, in file order."""
    return [] if data.train is None else list(dict.fromkeys(data.train["text"]))


def _encode(
    settings: Settings, tokenizer: Any, dataset: "Dataset", max_length: int, config: Any = None
) -> "Dataset":
    """One row for each different pair: ``input_ids``, ``attention_mask``, and ``labels``, which end the text."""
    from datasets import Dataset

    pairs = list(dict.fromkeys(zip(dataset["text"][:], dataset["target"][:], strict=True)))
    columns = encode(tokenizer, [settings.prefix + source for source, _ in pairs], max_length)
    labels = targets(tokenizer, [target for _, target in pairs], settings.target_length or max_length, config)
    return Dataset.from_dict({name: columns[name] for name in INPUTS[:2]} | {"labels": labels})


def targets(tokenizer: Any, texts: Sequence[str], most: int, config: Any) -> list[list[int]]:
    """The token ids of what a model is to write, at most so many, with the token that ends a text."""
    end = end_of(tokenizer, config)
    written = tokenizer(text_target=list(texts), truncation=True, max_length=most, padding=False)
    return [ended(ids, end, most) for ids in written["input_ids"]]


def end_of(tokenizer: Any, config: Any) -> int | None:
    """The token that ends what the model writes."""
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, list):
        return end[0]
    return tokenizer.eos_token_id if end is None else end


def ended(ids: list[int], end: int | None, most: int) -> list[int]:
    """``ids`` with ``end`` behind them, which some tokenizers leave out, and without which a model never stops."""
    return ids if end is None or ids[-1:] == [end] or len(ids) >= most else [*ids, end]


def collate(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
    """Texts padded to the longest text [B, T], labels to the longest target [B, U]."""
    return pad(tokenizer, [{name: row[name] for name in INPUTS if name in row} for row in rows])


def counts(rows: Any, config: Any = None) -> dict[Any, list[int]]:  # noqa: ARG001 - as for every task
    """The tokens of each text and of each target."""
    return {"source": [len(ids) for ids in rows["input_ids"]], "target": [len(ids) for ids in rows["labels"]]}


def check(data: Data, config: Any) -> None:  # noqa: ARG001 - the same call for every task
    """Any encoder-decoder will do; ModelError for another model."""
    if not config.is_encoder_decoder:
        raise ModelError(
            f"A {config.model_type} model has no decoder beside its encoder, so it cannot write from a text.",
            "Give an encoder-decoder, as T5, BART or Marian.",
        )


def forward(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """Logits [B, U, vocabulary] of the target given as ``labels``, each token from those before it. What has no
    ``attention_mask``, as the sounds of some models, has no padding."""
    out = model(**batch, use_cache=False, output_hidden_states=hidden_states)
    states, encoder = (), None
    if hidden_states:
        states, encoder = (
            out.encoder_hidden_states + out.decoder_hidden_states[1:],
            len(out.encoder_hidden_states) - 1,
        )
    written = (batch["labels"] != IGNORED).long()
    return Outputs(
        None, out.logits, states, batch.get("attention_mask"), written, along="target", encoder=encoder
    )


def write(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    settings: Settings | None = None,
    *,
    batch_size: int = 64,
    max_length: int | None = None,
) -> list[str]:
    """What the model writes for each text, in order. Seeded where ``generation`` samples; the model's mode stays.

    Raises OptionError for settings that ``generate`` does not take.
    """
    settings = settings or Settings()
    length = usable_length(tokenizer, model.config, max_length)
    encoded = encode(tokenizer, [settings.prefix + source for source in sources], length)
    most = usable_length(tokenizer, model.config, settings.target_length or max_length)
    given = (
        (where, {name: batch[name] for name in INPUTS[:2]})
        for where, batch in batches(tokenizer, encoded, batch_size)
    )
    return generate(model, tokenizer, given, settings, most)


def _evaluate(
    settings: Settings,
    measure: Measure,
    model: Any,
    tokenizer: Any,
    dataset: "Dataset",
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    teacher: Any = None,
) -> dict[str, float]:
    """The task's figures of what the model writes, and ``perplexity`` of the targets; with ``teacher`` also
    ``agreement``: the share of the targets' tokens for which both models, forced, have the same first choice."""
    written = write(
        model, tokenizer, dataset["text"][:], settings, batch_size=batch_size, max_length=max_length
    )
    rows = _encode(
        settings, tokenizer, dataset, usable_length(tokenizer, model.config, max_length), model.config
    )
    columns = {name: rows[name][:] for name in INPUTS}
    return measure(written, dataset["target"][:]) | forced(
        model, tokenizer, columns, batch_size, teacher, collate, counts
    )


def forced(
    model: Any,
    tokenizer: Any,
    columns: Mapping[str, Sequence[Any]],
    batch_size: int,
    teacher: Any,
    collate: Callable[..., "dict[str, Tensor]"],
    counts: Callable[..., Mapping[Any, Sequence[int]]],
) -> dict[str, float]:
    """``perplexity`` of the ``labels`` among the columns of inputs, and ``agreement`` with a teacher about them."""
    import torch

    device = next(model.parameters()).device
    longest = max(map(len, columns["labels"]))
    size = max(
        1, min(batch_size, LOGITS // (longest * model.config.get_text_config(decoder=True).vocab_size))
    )
    total, count, same = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for _, batch in batches(tokenizer, columns, size, collate, counts):
                inputs = {name: values.to(device) for name, values in batch.items()}
                asked = inputs["labels"] != IGNORED
                logits = forward(model, inputs).logits
                assert logits is not None
                ours = logits[asked].float()
                total += float(
                    torch.nn.functional.cross_entropy(ours, inputs["labels"][asked], reduction="sum")
                )
                count += int(asked.sum())
                if teacher is not None:
                    theirs = logits if teacher is model else forward(teacher, inputs).logits
                    assert theirs is not None
                    same += int((ours.argmax(-1) == theirs[asked].argmax(-1)).sum())
    finally:
        model.train(was_training)
    figures = {"perplexity": math.exp(min(total / count, 700))}
    return figures | ({} if teacher is None else {"agreement": same / count})


def needs(package: str, error: ImportError, extra: str = "text") -> DependencyError:
    """The error for a metric whose package is missing."""
    hint = f"Install it: pip install 'layershare[{extra}]'"
    return DependencyError(f"The figures need the package {package} ({error}).", hint)
