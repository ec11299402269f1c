"""Text to speech, by models that write a spectrogram (SpeechT5: Ao et al. 2021, arXiv 2110.07205): a vocoder makes a
wave of it.

Training and distillation force the decoder: it is asked for each frame given the true ones before it, and matched by
the squared error of the log-mel spectrograms. Judged by their mean distance, forced as well. A model that makes waves
by itself (VITS) cannot be trained with transformers; it can be shared, saved and loaded without any task.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from layershare.config import Config
from layershare.errors import DataError, ModelError
from layershare.tasks import sound
from layershare.tasks.encoding import batches, encode, pad
from layershare.tasks.files import text
from layershare.tasks.masking import IGNORED
from layershare.tasks.scores import correlations
from layershare.tasks.sound import halves
from layershare.tasks.task import Data, Outputs, Task, own_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "normalized_text", "sentence", "transcription", "transcript"),
    "audio": sound.COLUMNS["audio"],
}
INPUTS = ("input_ids", "attention_mask", "labels")


class Settings(Config):
    """How long a recording may be."""

    seconds: float = Field(
        10.0, gt=0, description="Longer recordings are refused; --skip-bad leaves them out."
    )


def configure(values: Mapping[str, Any]) -> Task:
    """The task with these :class:`Settings`."""
    settings = Settings.parse(values, where="text-to-speech")
    return Task(
        name="text-to-speech",
        auto_class="AutoModelForTextToSpectrogram",
        processor="AutoProcessor",
        metric="spectrogram_l1",
        higher_is_better=False,
        columns=COLUMNS,
        optional=frozenset(),
        read=partial(sound.read_said, settings.seconds, candidates=COLUMNS, convert={"text": text}),
        encode=_encode,
        texts=lambda data: [] if data.train is None else list(dict.fromkeys(data.train["text"])),
        check=_check,
        forward=forward,
        evaluate=_evaluate,
        metric_of=lambda dataset: "spectrogram_l1",  # noqa: ARG005 - the same call for every task
        inputs=INPUTS,
        collate=collate,
        counts=counts,
        loss=own_loss,
        learns=True,
        self_supervised=True,
        configure=configure,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
    )


def _check(data: Data, config: Any) -> None:  # noqa: ARG001 - the same call for every task
    """ModelError for a model that does not write a spectrogram."""
    if not config.is_encoder_decoder:
        raise ModelError(
            f"A {config.model_type} model does not write its spectrogram frame by frame.",
            "Give a SpeechT5; others can be shared without data, and without a task.",
        )


def _encode(processor: Any, dataset: "Dataset", max_length: int, config: Any = None) -> "Dataset":
    """One row a text: ``input_ids``, ``attention_mask``, where its recording is, and how many ``frames`` the decoder
    makes of it, each of ``reduction_factor`` frames of the spectrogram."""
    ears, words = halves(processor)
    columns = encode(words, dataset["text"][:], max_length)
    together = getattr(config, "reduction_factor", 1)
    frames = [
        (1 + sound.length(one, ears.sampling_rate) // ears.sample_stride) // together
        for one in dataset["audio"]
    ]
    if short := next((one for one, count in zip(dataset["audio"], frames, strict=True) if not count), None):
        raise DataError(f"{short['path'] or 'A recording'} is too short to make one frame of it.")
    rows = dataset.select_columns(["audio"])
    for name in INPUTS[:2]:
        rows = rows.add_column(name, columns[name])
    return rows.add_column("frames", frames).add_column("together", [together] * len(rows))


def collate(processor: Any, rows: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
    """Texts padded to the longest [B, T]; ``labels`` [B, U, mels] are log-mel spectrograms, -100 behind their end."""
    import torch

    ears, words = halves(processor)
    waves = [sound.samples(row["audio"], ears.sampling_rate) for row in rows]
    made = ears(audio_target=waves, sampling_rate=ears.sampling_rate, padding=True, return_tensors="pt")
    found = made["input_values"]
    ends = torch.tensor([row["frames"] * row["together"] for row in rows])
    labels = found[:, : int(ends.max())]
    beyond = torch.arange(labels.shape[1]) >= ends[:, None]
    batch = pad(words, [{name: row[name] for name in INPUTS[:2]} for row in rows])
    return batch | {"labels": labels.masked_fill(beyond[..., None], float(IGNORED))}


def counts(rows: Any, config: Any = None) -> dict[Any, list[int]]:  # noqa: ARG001 - as for every task
    """The tokens of each text, and the frames that are made of it."""
    return {"source": [len(ids) for ids in rows["input_ids"]], "target": rows["frames"][:]}


def forward(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """The spectrogram given as ``labels``, each frame from those before it, as numbers [B, U, mels, 1] for each step of
    the decoder; 0 behind its end."""
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]

    together = extract_model_from_parallel(model).config.reduction_factor
    out = model(**batch, use_cache=False, output_hidden_states=hidden_states)
    real = batch["labels"] != IGNORED
    made = (out.spectrogram * real).unflatten(1, (-1, together)).flatten(2)[..., None]
    states: tuple[Tensor, ...] = ()
    encoder = None
    if hidden_states:
        states = out.encoder_hidden_states + out.decoder_hidden_states[1:]
        encoder = len(out.encoder_hidden_states) - 1
    mask = real[:, together - 1 :: together, 0].long()
    return Outputs(
        None, made, states, batch["attention_mask"], mask, along="target", encoder=encoder, loss=out.loss
    )


def _evaluate(
    model: Any,
    processor: Any,
    dataset: "Dataset",
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    teacher: Any = None,
) -> dict[str, float]:
    """``spectrogram_l1``: the mean absolute error of the forced log-mel spectrograms (base 10), over all frames; with
    ``teacher`` also ``agreement``: the correlation with the teacher's numbers. Seeded: such a decoder always drops
    some of what it reads at random."""
    import torch

    rows = _encode(processor, dataset, max_length or 512, model.config)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    error, count = 0.0, 0
    both: tuple[list[float], list[float]] = ([], [])
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for _, batch in batches(processor, rows, batch_size, collate, counts):
                inputs = {name: values.to(device) for name, values in batch.items()}
                real = inputs["labels"] != IGNORED
                state = torch.get_rng_state()
                ours = model(**inputs, use_cache=False).spectrogram[real].float()
                error += float((ours - inputs["labels"][real]).abs().sum())
                count += int(real.sum())
                if teacher is not None:
                    torch.set_rng_state(state)
                    theirs = teacher(**inputs, use_cache=False).spectrogram[real].float()
                    both[0].extend(theirs.tolist())
                    both[1].extend(ours.tolist())
    finally:
        model.train(was_training)
    figures = {"spectrogram_l1": error / count}
    return figures | ({} if teacher is None else {"agreement": correlations(*both)["pearson"]})


TASK = configure({})
