"""What a model answers to a batch, for any task, and how far another model's answers are from these."""

from collections.abc import Callable, Iterator
from typing import Any

from layershare.sharing.pieces import logits_of, pieces
from layershare.sharing.sensitivity import Answer
from layershare.tasks.task import Outputs, Task

KEPT = 1 << 26
"""At most about so many logits of the original are kept to compare with (256 MB)."""
SPARED = 4
"""At least about one token of so many is compared: fewer texts are run where ``KEPT`` leaves fewer of each."""


def output_change(kind: Task, model: Any, batches: list[dict[str, Any]]) -> Callable[[Any], float]:
    """A function that says how far another model's answers are from those that ``model`` gives now, in the mean.

    Of embeddings it is 1 - cosine, of logits the KL divergence. Logits over a vocabulary are kept for evenly spread
    tokens only, ``KEPT`` numbers in all, of evenly spread texts if ``batches`` have more than ``SPARED`` times as many.
    """
    from torch import Tensor, no_grad
    from torch.nn.functional import cosine_similarity, kl_div

    cut = [piece for batch in batches for piece in pieces(model, batch)]
    cut = cut[:: max(1, sum(logits_of(model, piece) for piece in cut) // (SPARED * KEPT))]
    steps: dict[int, int] = {}

    @no_grad()
    def answers(one: Any) -> Iterator[tuple[Tensor, bool]]:
        one.eval()
        for i, piece in enumerate(cut):
            answer, logits = _answer(kind.forward(one, piece))
            if logits:
                answer = answer.flatten(0, -2)
                step = steps.setdefault(i, max(1, len(cut) * answer.numel() // KEPT))
                answer = answer[::step].float().log_softmax(-1)
            else:
                answer = answer.float()  # in bfloat16 an answer is not like itself
            yield answer, logits

    before = list(answers(model))

    def change(other: Any) -> float:
        total, count = 0.0, 0
        for (now, logits), (then, _) in zip(answers(other), before, strict=True):
            moved = (
                kl_div(now, then, log_target=True, reduction="sum")
                if logits
                else (1 - cosine_similarity(now, then, dim=-1)).sum()
            )
            total, count = total + float(moved), count + now.shape[:-1].numel()
        return total / count

    return change


def answer_of(kind: Task) -> Answer:
    """What a model of this task says to a batch, and whether it is logits."""
    return lambda model, batch: _answer(kind.forward(model, batch))


def _answer(output: Outputs) -> tuple[Any, bool]:
    """The embedding, or the logits; a single number, or one of several answers, as one vector of the whole batch: alone
    its direction would be but its sign. So are boxes or pixels, those that count; logits that come with such are one
    answer each."""
    if output.embedding is not None:
        return output.embedding, False
    if output.logits is None:
        weights = output.value_weights
        values = output.values if weights is None else output.values * weights[..., None]  # type: ignore[operator]
        return values.reshape(1, -1), False  # type: ignore[union-attr]
    if output.values is not None:
        return output.logits.flatten(0, -2), True
    if output.logits.shape[-1] == 1 or (output.along is None and output.logits.ndim == 3):
        return output.logits.reshape(1, -1), False
    mask = output.mask_of(output.along)
    return (output.logits if mask is None else output.logits[mask.bool()]), True
