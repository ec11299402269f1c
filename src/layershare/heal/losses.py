"""Distillation losses: tensors in, a scalar out. Identical student and teacher give exactly 0.

Everywhere: student first, teacher second; B texts, T tokens, d features, C classes. A ``mask`` is 1 (or
True) where an entry counts; entries with 0 change neither value nor gradient, whatever they hold, so padding
is free. Results are means, so they do not grow with the batch. No model and no config here.
"""

import torch
from torch import Tensor
from torch.nn import functional


def soft_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """KL(p || q) T^2, p the teacher's and q the student's softened distribution; in nats, a mean over entries
    (Hinton et al. 2015, arXiv 1503.02531).

    Takes logits and forms the log-probabilities itself. Much circulating code hands ``F.kl_div``
    probabilities where it wants log-probabilities, or swaps the two and so minimises KL(q || p); neither can
    be written with this function. T^2 keeps the size of the gradient when T changes.

    Args:
        student, teacher: logits [..., C].
        temperature: T > 0; higher looks more at the unlikely classes.
        mask: [...], the entries that count; None for all.
    """
    q = functional.log_softmax(_select(student, mask) / temperature, dim=-1)
    p = functional.log_softmax(_select(teacher, mask) / temperature, dim=-1)
    return (p.exp() * (p - q)).sum(-1).mean() * temperature**2


def logit_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of logits [..., C] (Ba, Caruana 2014, arXiv 1312.6184)."""
    return functional.mse_loss(_select(student, mask), _select(teacher, mask))


def soft_and_hard(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    lambda_mse: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """1/2 (KL(p || q) T^2 + lambda MSE) on logits [..., C]: the two logit losses in one.

    With T = 1 the KL alone is blind to a constant added to all logits of a text; the MSE is not.
    """
    loss = soft_kl(student, teacher, temperature, mask)
    if lambda_mse:
        loss = loss + lambda_mse * logit_mse(student, teacher, mask)
    return loss / 2


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference of hidden states [B, T, d], relative to the mean square of the teacher's.

    0 for equal states, 1 for a student that says 0; so one weight serves layers and models of any scale
    (TinyBERT, Jiao et al. 2019, arXiv 1909.10351, uses the plain MSE). ``mask`` is [B, T].
    """
    theirs = _select(teacher, mask)
    return functional.mse_loss(_select(student, mask), theirs) / theirs.square().mean().clamp(min=1e-12)


def embedding_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the embeddings [B, d], averaged over the batch; between 0 and 2.

    Computed as half the squared distance of the unit vectors: the same value, but exactly 0 for equal
        embeddings.
    """
    difference = functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)
    return difference.square().sum(-1).mean() / 2


def embedding_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the embeddings [B, d] (Reimers, Gurevych 2020, arXiv 2004.09813)."""
    return functional.mse_loss(student, teacher)


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines between the texts of a batch, [B, d] each; 0 for B < 2.

    Compares S S^T with the teacher's, off the diagonal (similarity-preserving distillation, Tung, Mori 2019,
    arXiv 1907.09682). It asks for the teacher's geometry, not its axes, so it also serves when d differs.
    """
    size = len(student)
    if size < 2:
        return student.sum() * 0  # stays in the graph, so that a batch of one still has a gradient
    ours, theirs = (functional.normalize(x, dim=-1) for x in (student, teacher))
    # The diagonals are 1 - 1 up to rounding; counting only the B (B - 1) others makes the value independent
    # of B.
    off_diagonal = ~torch.eye(size, dtype=torch.bool, device=student.device)
    return (ours @ ours.T - theirs @ theirs.T)[off_diagonal].square().mean()


def _select(values: Tensor, mask: Tensor | None) -> Tensor:
    """The entries that count, [n, ...]. Selecting, not multiplying, keeps inf and nan in padding out."""
    return values if mask is None else values[mask.bool()]
