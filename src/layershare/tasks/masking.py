"""What a language model is to guess: masked tokens (BERT) and left-out spans (T5). Pure functions on token ids.

All chance comes from the generator that is passed in, so the same generator gives the same masks. No torch here.
"""

from collections.abc import Sequence

import numpy as np

IGNORED = -100
"""The label of a token that is not asked for."""


def mask_tokens(
    ids: Sequence[int],
    special: np.ndarray,
    mask_id: int,
    draw: np.random.Generator,
    rate: float = 0.15,
) -> tuple[list[int], list[int]]:
    """Masked language modelling (Devlin et al. 2018, arXiv 1810.04805): ids -> (ids with masks, labels).

    Each token that is not special is asked for with chance ``rate``, and at least one is. Of those asked for, 80 %
    become the mask token, 10 % an ordinary token drawn evenly, 10 % stay. Labels are ids where asked, else -100.

    Args:
        ids: [T].
        special: [vocabulary], true for tokens that are never asked for nor drawn.
        mask_id: the mask token.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    ordinary = ~special[tokens]
    chance = draw.random(tokens.size)
    asked = ordinary & (chance < rate)
    if not asked.any() and ordinary.any():
        asked[np.where(ordinary, chance, 2.0).argmin()] = True
    labels = np.where(asked, tokens, IGNORED)
    fate = draw.random(tokens.size)
    usual = np.flatnonzero(~special)
    masked = np.where(asked & (fate < 0.8), mask_id, tokens)
    masked = np.where(asked & (fate >= 0.9), usual[draw.integers(usual.size, size=tokens.size)], masked)
    return masked.tolist(), labels.tolist()


def noise_spans(length: int, draw: np.random.Generator, rate: float = 0.15, mean: float = 3.0) -> np.ndarray:
    """Which of ``length`` tokens T5 leaves out (Raffel et al. 2019, arXiv 1910.10683): [length], bool.

    ``rate * length`` tokens, rounded, in ``rate * length / mean`` spans, rounded; both and therefore the lengths of
    input and target depend on ``length`` alone. As in T5's own code, kept and left-out runs take turns, a kept one
    comes first, and their lengths are drawn evenly from all ways to divide the tokens.
    """
    noise = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(noise / mean), 1), length - noise)
    mask = np.zeros(length, dtype=bool)
    at = 0
    for kept, left_out in zip(_divide(length - noise, spans, draw), _divide(noise, spans, draw), strict=True):
        at += kept
        mask[at : at + left_out] = True
        at += left_out
    return mask


def corrupt_spans(
    ids: Sequence[int], noise: np.ndarray, sentinels: Sequence[int], end: int
) -> tuple[list[int], list[int]]:
    """T5's span corruption: ids -> (input, target).

    Every run of ``noise`` becomes one sentinel in the input; the target lists each sentinel with the tokens behind it.
    Both end with ``end``.

    >>> corrupt_spans([5, 6, 7, 8, 9], np.array([0, 1, 1, 0, 1], bool), [99, 98], end=1)
    ([5, 99, 8, 98, 1], [99, 6, 7, 98, 9, 1])
    """
    left: list[int] = []
    target: list[int] = []
    used, before = 0, False
    for token, gone in zip(ids, noise.tolist(), strict=True):
        if gone and not before:
            left.append(sentinels[used])
            target.append(sentinels[used])
            used += 1
        (target if gone else left).append(token)
        before = gone
    return [*left, end], [*target, end]


def spans_of(length: int, rate: float = 0.15, mean: float = 3.0) -> int:
    """How many spans, and so sentinels, a text of ``length`` tokens needs."""
    noise = min(max(round(length * rate), 1), length - 1)
    return min(max(round(noise / mean), 1), length - noise)


def _divide(items: int, parts: int, draw: np.random.Generator) -> list[int]:
    """A division of ``items`` into ``parts`` of at least one, every one equally likely."""
    cuts = np.sort(draw.choice(items - 1, size=parts - 1, replace=False) + 1)
    return np.diff(cuts, prepend=0, append=items).tolist()
