"""Self-speculative decoding: some positions of a model guess the next tokens, all of them check the guesses at once.

(Draft & Verify, Zhang et al., 2023, arXiv 2309.08168; stopping where the draft is unsure as in Kangaroo, Liu et al.,
2024, arXiv 2404.18911.)
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from layershare.decoding.view import draft_view
from layershare.errors import OptionError

PENALTIES = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "min_length")
"""Off at 1, too."""
BEYOND_GREEDY = (
    *PENALTIES, "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "sequence_bias", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id",
)  # fmt: skip
"""Settings of a generation config with which greedy search gives other tokens."""


@dataclass
class Speculative:
    """A decoder and its draft; see :func:`speculative`.

    Attributes:
        model: the decoder.
        assistant: the draft, a view of the same parameters: also for ``model.generate(assistant_model=...)``, which
            can sample and stream.
        tokens: guesses a round, at most.
        sure: a guess of less probability ends the round.
        rounds, guessed, accepted: of the last call: checks by the whole model, guesses, and those that were right.
    """

    model: Any
    assistant: Any
    tokens: int
    sure: float
    rounds: int = field(default=0, init=False)
    guessed: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int = 20) -> Tensor:
        """The text [1, T] and what follows it [1, T + new], the tokens of greedy search without a draft.

        Ends with an end token of the model's generation config, or after ``max_new_tokens``. Raises OptionError for
        several texts at once, and where that config asks for more than greedy search (see :attr:`assistant`).
        """
        _check(input_ids, self.model)
        ends = _ends(self.model)
        self.rounds = self.guessed = self.accepted = 0
        ours, drafts = _cache(self.model), _cache(self.assistant)
        known: list[int] = input_ids[0].tolist()
        limit = len(known) + max_new_tokens
        known += self._check_guesses(ours, known, [])
        while known[-1] not in ends and len(known) < limit:
            guesses = self._guess(drafts, known, min(self.tokens, limit - len(known) - 1))
            found = self._check_guesses(ours, known, guesses)
            stop = next((i + 1 for i, token in enumerate(found) if token in ends), len(found))
            known += found[:stop]
            # The last token is in no cache yet; what was guessed wrong goes out of both.
            for cache in (ours, drafts):
                cache.crop(min(0, len(known) - 1 - cache.get_seq_length()))
        return torch.cat([input_ids, input_ids.new_tensor([known[input_ids.shape[1] : limit]])], 1)

    def _guess(self, cache: DynamicCache, known: Sequence[int], count: int) -> list[int]:
        guesses: list[int] = []
        while len(guesses) < count:
            text = [*known, *guesses]
            logits = self._run(self.assistant, cache, text, last=1)[-1]
            token = int(logits.argmax())
            guesses.append(token)
            if self.sure and float(logits.float().softmax(-1)[token]) < self.sure:
                break
        return guesses

    def _check_guesses(self, cache: DynamicCache, known: Sequence[int], guesses: Sequence[int]) -> list[int]:
        """The guesses as far as they are right, and the token behind them."""
        answers = self._run(self.model, cache, [*known, *guesses], last=len(guesses) + 1).argmax(-1).tolist()
        right = next((i for i, guess in enumerate(guesses) if guess != answers[i]), len(guesses))
        self.rounds += 1
        self.guessed += len(guesses)
        self.accepted += right
        return answers[: right + 1]

    def _run(self, model: Any, cache: DynamicCache, text: Sequence[int], last: int) -> Tensor:
        """Logits of the tokens behind the ``last`` ones of a text [last, words], whose beginning is in the cache."""
        new = torch.tensor([text[cache.get_seq_length() :]], device=model.device)
        keep = {"logits_to_keep": last} if self._keeps else {}
        return model(input_ids=new, past_key_values=cache, use_cache=True, **keep).logits[0, -last:]


def speculative(model: Any, draft: Iterable[int], *, tokens: int = 5, sure: float = 0.4) -> Speculative:
    """Decode greedily, faster where guesses are often right: the same tokens as without.

    Args:
        model: a decoder in evaluation mode, shared or not.
        draft: the positions that guess, counted from 0; see :func:`layershare.decoding.choose_draft`.
        tokens: guesses a round, at most.
        sure: a guess of less probability is the last of its round; 0: none is.

    Raises OptionError, and ModelError for what is no decoder with one stack of layers and a cache that can go back.
    """
    if tokens < 1 or not 0 <= sure < 1:
        raise OptionError("tokens is 1 or more, sure a probability below 1.")
    return Speculative(model.eval(), draft_view(model, sorted(set(draft))), tokens, sure)


def _check(input_ids: Tensor, model: Any) -> None:
    if input_ids.ndim != 2 or len(input_ids) != 1 or not input_ids.shape[1]:
        raise OptionError("Speculative decoding takes one text [1, T] at a time.", "Call it for each.")
    for name in BEYOND_GREEDY:
        value = getattr(model.generation_config, name, None)
        if value not in (None, 0, [], {}) and not (name in PENALTIES and value == 1):
            raise OptionError(
                f"The model's generation config sets {name}, which is not followed here.",
                "Use model.generate(..., assistant_model=speculative.assistant), or change the config.",
            )


def _cache(model: Any) -> DynamicCache:
    """One from which tokens can be taken back, also behind a sliding window."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def _ends(model: Any) -> set[int]:
    """The end tokens of the model's generation config."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
