"""Texts that a model writes by itself, with ``generate``, as the user sets it: one for each input."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import Field

from layershare.config import Config
from layershare.errors import OptionError, nearest

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = {"num_return_sequences": 1, "return_dict_in_generate": False}
"""Settings of ``generate`` that would give something else than one text for each."""


class Writing(Config):
    """How a model writes."""

    num_beams: int | None = Field(
        None, ge=1, description="Beams of the search; 1 is greedy; default: the model's."
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="Most tokens written for a text; default: as many as a target may have."
    )
    generation: dict[str, Any] = Field(
        {}, description="Other settings of transformers' generate, as length_penalty or no_repeat_ngram_size."
    )


class Targets(Writing):
    """How a model writes, and how much of a text it is taught to write."""

    target_length: int = Field(
        0, ge=0, description="Longer targets are cut to this many tokens in training; 0: as the texts are."
    )


def generate(
    model: Any,
    tokenizer: Any,
    given: "Iterable[tuple[Sequence[int], Mapping[str, Tensor]]]",
    settings: Writing,
    most: int,
    also: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """What the model writes for each input, in the order of their numbers, which go with the batches ``given``; at most
    ``most`` tokens, if the settings say nothing. ``also``: what the model's own ``generate`` takes beside. Seeded; the
    model's mode stays."""
    import torch

    options = {**_options(settings, most), **also}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    result: dict[int, str] = {}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for indices, batch in given:
                inputs = {name: values.to(device) for name, values in batch.items()}
                try:
                    written = model.generate(**inputs, **options)
                except (ValueError, TypeError) as error:
                    raise OptionError(
                        f"generate refuses {options} ({' '.join(str(error).split())})."
                    ) from None
                lines = tokenizer.batch_decode(written, skip_special_tokens=True)
                result |= {index: line.strip() for index, line in zip(indices, lines, strict=True)}
    finally:
        model.train(was_training)
    return [result[index] for index in range(len(result))]


def _options(settings: Writing, most: int) -> dict[str, Any]:
    """What ``generate`` is told."""
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    if wrong := next((key for key in settings.generation if key not in known), None):
        raise OptionError(f"generation: unknown key {wrong!r}.", nearest(wrong, known))
    given = {key: settings.generation.get(key) for key in SINGLE}
    if many := next((key for key, value in given.items() if value not in (None, SINGLE[key])), None):
        raise OptionError(f"generation: {many} is not for this task.", "One plain text is written for each.")
    own = {"num_beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens}
    length = {} if "max_length" in settings.generation else {"max_new_tokens": most}
    return length | settings.generation | {name: value for name, value in own.items() if value is not None}
