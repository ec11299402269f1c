"""Speech recognition: from a sound to what is said in it.

Which head a model has follows from its config. An encoder-decoder (Whisper) writes the transcript token by token, so it
is trained and judged like a translator, see :mod:`layershare.tasks.seq2seq`. An encoder (Wav2Vec2) says at every frame
which character it hears, or none, and is trained by connectionist temporal classification (Graves et al. 2006): the
loss is that of all ways to spell the transcript. In distillation the teacher's answer at each frame is matched.

Judged by word and character error rates, as jiwer counts them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from layershare.errors import DataError, ModelError, OptionError
from layershare.tasks import seq2seq, sound
from layershare.tasks.encoding import batches, pad
from layershare.tasks.files import text
from layershare.tasks.masking import IGNORED
from layershare.tasks.sound import halves
from layershare.tasks.task import Data, Outputs, Task, label_loss, no_texts
from layershare.tasks.word_errors import measure, normalizer
from layershare.tasks.writing import Writing, generate

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

COLUMNS: dict[str, tuple[str, ...]] = {
    "audio": sound.COLUMNS["audio"],
    "transcript": (
        "transcript", "transcription", "text", "sentence", "normalized_text", "target", "words", "utterance",
    ),
}  # fmt: skip
INPUTS = (*sound.INPUTS, "labels")


class Settings(Writing):
    """How sounds are given to the model, how it writes, and how texts are compared. Those of
    :class:`~layershare.tasks.writing.Writing` are for models that write token by token."""

    seconds: float = Field(30.0, gt=0, description="Longer sounds are refused; --skip-bad leaves them out.")
    language: str = Field("", description="What is spoken, as en, for a model of many languages.")
    prefix: str = Field(
        "", description="Put before every transcript to train on; Whisper itself begins with a space."
    )
    normalize: Literal["basic", "english", "none"] = Field(
        "basic",
        description="What does not count as an error. basic: case, punctuation, what is in brackets; english: also how "
        "numbers and contractions are written; none: nothing.",
    )


def configure(values: Mapping[str, Any]) -> Task:
    """The task with these :class:`Settings`."""
    settings = Settings.parse(values, where="speech-recognition")
    return Task(
        name="speech-recognition",
        auto_class="AutoModelForSpeechSeq2Seq|AutoModelForCTC",
        processor="AutoProcessor",
        unit="sound",
        metric="wer",
        higher_is_better=False,
        columns=COLUMNS,
        optional=frozenset(),
        read=partial(sound.read_said, settings.seconds, candidates=COLUMNS, convert={"transcript": text}),
        encode=partial(_encode, settings),
        texts=no_texts,
        check=_check,
        forward=forward,
        evaluate=partial(_evaluate, settings),
        metric_of=lambda dataset: "wer",  # noqa: ARG005 - the same call for every task
        inputs=INPUTS,
        collate=partial(collate, seconds=settings.seconds),
        counts=counts,
        loss=loss,
        learns=True,
        configure=configure,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
    )


def _check(data: Data, config: Any) -> None:  # noqa: ARG001 - the same call for every task
    """ModelError for a model that neither has a decoder beside its encoder nor spells."""
    from transformers import AutoModelForCTC

    if _is_ctc(config) and type(config) not in AutoModelForCTC._model_mapping:
        raise ModelError(
            f"A {config.model_type} model is neither an encoder-decoder nor one that spells by CTC.",
            "Give one as Whisper or Wav2Vec2.",
        )


def _encode(
    settings: Settings, processor: Any, dataset: "Dataset", max_length: int, config: Any = None
) -> "Dataset":
    """One row for each different sound, with its transcript as ``labels``; of several transcripts the first."""
    ears, words = halves(processor)
    first: dict[str, int] = {}
    for place, one in enumerate(dataset["audio"]):
        first.setdefault(one["sha256"], place)
    chosen = dataset.select(list(first.values()))
    said = [settings.prefix + one for one in chosen["transcript"]]
    labels = _spelled(words, said) if _is_ctc(config) else _written(settings, words, said, max_length, config)
    most = max((max(ids, default=0) for ids in labels), default=0)
    if config is not None and most >= (size := config.get_text_config(decoder=True).vocab_size):
        raise ModelError(
            f"The tokenizer has a token {most}, the model only {size} tokens.", "They do not belong together."
        )
    rows = sound.with_samples(ears, _heard(ears, chosen), settings.seconds)
    return rows.add_column("labels", labels)


def _written(
    settings: Settings, words: Any, said: list[str], max_length: int, config: Any
) -> list[list[int]]:
    """Transcripts as a decoder writes them behind its start token, with the end behind them."""
    _speak(words, settings)
    most = min(max_length, getattr(config, "max_target_positions", max_length))
    start, end = getattr(config, "decoder_start_token_id", None), seq2seq.end_of(words, config)
    ids = [one[1:] if one[:1] == [start] else one for one in words(said)["input_ids"]]
    return [seq2seq.ended(one[:most], end, most) for one in ids]


def _speak(words: Any, settings: Settings) -> None:
    if settings.language:
        if not hasattr(words, "set_prefix_tokens"):
            raise OptionError("language is for models of many languages, as Whisper.", "Leave it out.")
        words.set_prefix_tokens(language=settings.language, task="transcribe")


def _spelled(words: Any, said: list[str]) -> list[list[int]]:
    """Transcripts in the letters of a vocabulary of characters, in upper or lower case, whichever it knows better; what
    it does not have is left out, as punctuation mostly is. Other vocabularies take the transcripts as they are."""
    known = words.get_vocab().keys() - set(words.all_special_tokens)
    if any(len(token) > 1 for token in known):
        return words(said)["input_ids"]
    cases: tuple[Callable[[str], str], ...] = (str, str.upper, str.lower)
    best = max(cases, key=lambda case: sum(letter in known for one in said for letter in case(one)))
    lines = [
        " ".join("".join(letter if letter in known else " " for letter in best(one)).split()) for one in said
    ]
    if lost := next((one for one, line in zip(said, lines, strict=True) if not line), None):
        raise DataError(
            f"The model's vocabulary has no character of the transcript {lost!r}.",
            f"It has {''.join(sorted(known))!r}. Write numbers in words.",
        )
    return words(lines)["input_ids"]


def _heard(ears: Any, dataset: "Dataset") -> "Dataset":
    """The sounds alone, if none is longer than the model listens."""
    if most := getattr(ears, "n_samples", None):
        long = next((one for one in dataset["audio"] if sound.length(one, ears.sampling_rate) > most), None)
        if long is not None:
            raise DataError(
                f"{long['path'] or 'A sound'} lasts {sound.duration(long):.1f} s, the model listens for "
                f"{most / ears.sampling_rate:g}.",
                "Set seconds to that, and --skip-bad leaves out what is longer.",
            )
    return dataset.select_columns(["audio"])


def collate(processor: Any, rows: Sequence[Mapping[str, Any]], *, seconds: float) -> "dict[str, Tensor]":
    """As :func:`layershare.tasks.sound.collate`; ``labels`` [B, U] are padded to the longest transcript."""
    ears, words = halves(processor)
    batch = sound.collate(ears, [{"audio": row["audio"]} for row in rows], seconds=seconds)
    return batch | (pad(words, [{"labels": row["labels"]} for row in rows]) if "labels" in rows[0] else {})


def counts(rows: Any, config: Any = None) -> dict[Any, list[int]]:
    """The samples, or frames, of each sound, see :func:`layershare.tasks.sound.counts`, and the tokens that are to be
    written."""
    found = sound.counts(rows, config)
    if "labels" in getattr(rows, "column_names", rows) and not _is_ctc(config):
        found["target"] = [len(ids) for ids in rows["labels"]]
    return found


def _is_ctc(config: Any) -> bool:
    return config is not None and not config.is_encoder_decoder


def forward(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """Logits [B, U, vocabulary] of the transcript given as ``labels``, each token from those before it; or, of a model
    that spells, [B, T, vocabulary] for each frame."""
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]

    inner = extract_model_from_parallel(model)
    config, mask = inner.config, sound.mask_of(inner, batch)
    if not _is_ctc(config):
        return replace(seq2seq.forward(model, batch, hidden_states=hidden_states), mask=mask)
    heard = {name: batch[name] for name in sound.INPUTS if name in batch}
    out = model(**heard, output_hidden_states=hidden_states)
    states = out.hidden_states if hidden_states else ()
    return Outputs(None, out.logits, states, mask, along="source", blank=config.pad_token_id)


def loss(outputs: Outputs, labels: "Tensor") -> "Tensor":
    """Cross-entropy of the written tokens; of a model that spells, the CTC loss by the length of the transcript, 0
    where a sound has too few frames for it."""
    if outputs.blank is None:
        return label_loss(outputs, labels)
    import torch

    assert outputs.logits is not None
    chances = outputs.logits.float().log_softmax(-1).transpose(0, 1)
    frames = torch.full((len(labels),), len(chances)) if outputs.mask is None else outputs.mask.sum(1)
    return torch.nn.functional.ctc_loss(
        chances,
        labels.clamp(min=0),
        frames,
        (labels != IGNORED).sum(1),
        blank=outputs.blank,
        zero_infinity=True,
    )


def transcribe(
    model: Any, processor: Any, sounds: "Dataset", settings: Settings | None = None, *, batch_size: int = 16
) -> list[str]:
    """What the model hears in each row's ``audio``, in order.

    Raises OptionError for settings that ``generate`` does not take.
    """
    settings = settings or Settings()
    ears, words = halves(processor)
    rows = sound.with_samples(ears, _heard(ears, sounds), settings.seconds)
    batched = batches(processor, rows, batch_size, partial(collate, seconds=settings.seconds), sound.counts)
    if _is_ctc(model.config):
        return _decode(model, words, batched)
    spoken = {"language": settings.language, "task": "transcribe"} if settings.language else {}
    most = getattr(model.config, "max_target_positions", 2 * 224) // 2  # the other half is for a prompt
    return generate(model, words, batched, settings, most, spoken)


def _decode(model: Any, words: Any, batched: Any) -> list[str]:
    """The likeliest token of each frame; equal neighbours are one, and blanks none."""
    import torch

    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    result: dict[int, str] = {}
    try:
        with torch.no_grad():
            for where, batch in batched:
                out = forward(model, {name: values.to(device) for name, values in batch.items()})
                assert out.logits is not None
                assert out.blank is not None
                best = out.logits.argmax(-1)
                if out.mask is not None:
                    best = best.masked_fill(out.mask == 0, out.blank)
                lines = words.batch_decode(best, skip_special_tokens=True)
                result |= dict(zip(where, map(str.strip, lines), strict=True))
    finally:
        model.train(was_training)
    return [result[row] for row in range(len(result))]


def _evaluate(
    settings: Settings,
    model: Any,
    processor: Any,
    dataset: "Dataset",
    *,
    batch_size: int = 16,
    max_length: int | None = None,  # noqa: ARG001 - as for every task
    teacher: Any = None,
) -> dict[str, float]:
    """``wer`` and ``cer``: the words, and characters, that are wrong, missing or too many, as a share of those of all
    transcripts together. With ``teacher`` also ``agreement``: the share of sounds in which both hear the same."""
    ours = transcribe(model, processor, dataset, settings, batch_size=batch_size)
    figures = measure(settings.normalize, ours, dataset["transcript"][:])
    if teacher is not None:
        theirs = (
            ours
            if teacher is model
            else transcribe(teacher, processor, dataset, settings, batch_size=batch_size)
        )
        plain = normalizer(settings.normalize)
        same = [plain(one) == plain(other) for one, other in zip(ours, theirs, strict=True)]
        figures["agreement"] = sum(same) / len(same)
    return figures


TASK = configure({})
