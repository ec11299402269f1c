"""Greedy decoding with a key-value cache that stays inside onnxruntime between the steps.

``runner`` is a :class:`layershare.onnx.runner.Runner`.
"""

from collections.abc import Generator
from typing import Any

import numpy as np

PRESENT, PAST = "present.", "past_key_values."


def decode(runner: Any, input_ids: np.ndarray, attention_mask: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """New token ids [N, at most max_new_tokens], greedily; behind an end token a row goes on with it."""
    scores = steps(runner, input_ids, attention_mask)
    logits, found, ended = next(scores), [], np.zeros(len(input_ids), bool)
    while True:
        best = logits.argmax(-1)
        if runner.eos:
            best = np.where(ended, runner.eos[0], best)
            ended |= np.isin(best, runner.eos)
        found.append(best)
        if len(found) >= max_new_tokens or ended.all():
            return np.stack(found, axis=1)
        logits = scores.send(best)


def steps(
    runner: Any, input_ids: np.ndarray, attention_mask: np.ndarray
) -> Generator[np.ndarray, np.ndarray, None]:
    """Yields the logits [N, vocabulary] of the next token, and takes the token [N] that was chosen."""
    from onnxruntime import OrtValue

    fixed: dict[str, Any] = {}
    if runner.kind == "encoder-decoder":
        source = runner("encoder", input_ids=input_ids, attention_mask=attention_mask)
        fixed = {_past(name): array for name, array in source.items() if name.startswith(PRESENT)}
        fixed |= {"encoder_attention_mask": attention_mask}
        input_ids = np.full((len(input_ids), 1), runner.start)
        attention_mask = np.ones_like(input_ids)
        session = runner.sessions["decoder"]
    else:
        session = runner.sessions["model"]
    known = {one.name: one.shape for one in session.get_inputs()}
    outputs = [one.name for one in session.get_outputs()]
    past = {
        name: np.zeros((len(input_ids), shape[1], 0, shape[3]), np.float32)
        for name, shape in known.items()
        if name.startswith(PAST) and name not in fixed
    }
    states = {name: OrtValue.ortvalue_from_numpy(array) for name, array in (fixed | past).items()}
    while True:
        length = input_ids.shape[1]
        positions = np.maximum(attention_mask.cumsum(1) - 1, 0)[:, -length:]
        now = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        fed = {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, np.int64))
            for name, array in now.items()
            if name in known
        }
        answer = dict(zip(outputs, session.run_with_ort_values(outputs, fed | states), strict=True))
        states |= {_past(name): value for name, value in answer.items() if name.startswith(PRESENT)}
        chosen = yield answer["logits"].numpy()[:, -1]
        input_ids = np.asarray(chosen)[:, None]
        attention_mask = np.concatenate([attention_mask, np.ones_like(input_ids)], axis=1)


def _past(present: str) -> str:
    return present.replace(PRESENT, PAST, 1)
