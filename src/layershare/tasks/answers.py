"""What a model answers to a batch, for any task, and how far another model's answers are from these."""

from collections.abc import Callable
from typing import Any

from layershare.sharing.sensitivity import Answer
from layershare.tasks.task import Outputs, Task


def output_change(kind: Task, model: Any, batches: list[dict[str, Any]]) -> Callable[[Any], float]:
    """A function that says how far another model's answers are from those that ``model`` gives now."""
    from torch import Tensor, no_grad
    from torch.nn.functional import cosine_similarity

    @no_grad()
    def answers(one: Any) -> list[Tensor]:
        one.eval()
        return [_answer(kind.forward(one, batch))[0] for batch in batches]

    before = answers(model)

    def change(other: Any) -> float:
        pairs = zip(answers(other), before, strict=True)
        return sum(float((1 - cosine_similarity(now, then, dim=-1)).sum()) for now, then in pairs)

    return change


def answer_of(kind: Task) -> Answer:
    """What a model of this task says to a batch, and whether it is logits."""
    return lambda model, batch: _answer(kind.forward(model, batch))


def _answer(output: Outputs) -> tuple[Any, bool]:
    """The embedding, or the logits; a single number, or one of several answers, as one vector of the whole batch: alone
    its direction would be but its sign."""
    if output.embedding is not None or output.logits is None:
        return output.embedding, False
    if output.logits.shape[-1] == 1 or (output.along is None and output.logits.ndim == 3):
        return output.logits.reshape(1, -1), False
    mask = output.mask_of(output.along)
    return (output.logits if mask is None else output.logits[mask.bool()]), True
