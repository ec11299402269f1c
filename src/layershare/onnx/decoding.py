"""Greedy decoding with a key-value cache that stays inside onnxruntime between the steps.

``runner`` is a :class:`layershare.onnx.runner.Runner`.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

PRESENT, PAST = "present.", "past_key_values."


def decode(
    runner: Any, read: Mapping[str, np.ndarray], max_new_tokens: int, start: Sequence[int] = ()
) -> np.ndarray:
    """New token ids [N, at most max_new_tokens], greedily; behind an end token a row goes on with it. The tokens that
    the model is never to say, or not at first, are not said."""
    scores = steps(runner, read, start)
    logits, found = next(scores), list[np.ndarray]()
    ended = np.zeros(len(logits), bool)
    barred = runner.barred + runner.barred_first
    while True:
        logits[:, barred], barred = -np.inf, runner.barred
        best = logits.argmax(-1)
        if runner.eos:
            best = np.where(ended, runner.eos[0], best)
            ended |= (best[:, None] == runner.eos).any(1)
        found.append(best)
        if len(found) >= max_new_tokens or ended.all():
            return np.stack(found, axis=1)
        logits = scores.send(best)


def steps(
    runner: Any, read: Mapping[str, np.ndarray], start: Sequence[int] = ()
) -> Generator[np.ndarray, np.ndarray, None]:
    """Yields the logits [N, vocabulary] of the next token, and takes the token [N] that was chosen."""
    from onnxruntime import OrtValue

    fixed: dict[str, Any] = {}
    if runner.kind == "encoder-decoder":
        made = runner("encoder", **read)
        fixed = {_past(name): array for name, array in made.items() if name.startswith(PRESENT)}
        rows = len(next(iter(read.values())))
        input_ids = np.array([start or runner.start] * rows, np.int64)
        attention_mask = np.ones_like(input_ids)
        session = runner.sessions["decoder"]
        if "encoder_attention_mask" in {one.name for one in session.get_inputs()}:
            fixed["encoder_attention_mask"] = np.asarray(read["attention_mask"], np.int64)
    else:
        input_ids, attention_mask = read["input_ids"], read["attention_mask"]
        session = runner.sessions["model"]
    known = {one.name: one.shape for one in session.get_inputs()}
    grows = [name for name in known if name.startswith(PAST) and name not in fixed]
    outputs = ["logits", *(_present(name) for name in grows)]
    value = OrtValue.ortvalue_from_numpy
    states = {name: value(array) for name, array in fixed.items()}
    for name in grows:
        _, heads, _, size = known[name]
        states[name] = value(np.zeros((len(input_ids), heads, 0, size), np.float32))

    def step() -> list[Any]:
        """The logits, and then keys and values in the order of ``grows``."""
        positions = np.maximum(attention_mask.cumsum(1) - 1, 0)[:, -input_ids.shape[1] :]
        now = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        for name in now.keys() & known.keys():
            states[name] = value(np.ascontiguousarray(now[name], np.int64))
        return session.run_with_ort_values(outputs, states)

    if runner.languages and not start:
        told, input_ids = input_ids[:, 1:], input_ids[:, :1]
        odds = step()[0].numpy()[:, -1, runner.languages]
        heard = np.array(runner.languages)[odds.argmax(-1)]
        input_ids = np.concatenate([input_ids, heard[:, None], told], axis=1)
        attention_mask = np.ones_like(input_ids)
    while True:
        logits, *kept = step()
        states.update(zip(grows, kept, strict=True))
        chosen = yield logits.numpy()[:, -1]
        input_ids = np.asarray(chosen)[:, None]
        attention_mask = np.concatenate([attention_mask, np.ones_like(input_ids)], axis=1)


def _past(present: str) -> str:
    return present.replace(PRESENT, PAST, 1)


def _present(past: str) -> str:
    return past.replace(PAST, PRESENT, 1)
