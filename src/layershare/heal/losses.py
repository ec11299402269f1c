"""Distillation losses: tensors in, a scalar out. Identical student and teacher give exactly 0.

Everywhere: student first, teacher second; B texts, T tokens, d features, C classes (or words of the vocabulary). A
``mask`` is 1 (or True) where an entry counts; entries with 0 change neither value nor gradient, whatever they hold, so
padding is free. Results are means, so they do not grow with the batch. No model and no config here.

The loss of logits is ``L = 1/2 * sum(KL(p || q) T^2 + lambda MSE(z_t, z_s))``, p and q the softened distributions of
teacher and student, z their logits; here the sum over the n entries is divided by n. Circulating examples get it wrong
in two ways: they hand ``KLDivLoss`` probabilities where it takes log-probabilities (its result is then no divergence:
it is not 0 for equal models, and can be negative), and they swap its arguments, which minimises KL(q || p) with the
gradient running into the wrong side. A third: ``reduction="mean"`` divides by C as well. None of the three can be
written with these functions, which take logits, student first, and form the log-probabilities themselves.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The label of an entry that has none."""


class TopLogits(NamedTuple):
    """The k largest logits of each entry, and what the others weigh together."""

    values: Tensor
    """[..., k], largest first."""
    indices: Tensor
    """[..., k], where they stood."""
    rest: Tensor
    """[...], log of the sum of exp(z / T) over all others; -inf when there are none."""


def soft_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """KL(p || q) T^2, p the teacher's and q the student's softened distribution; in nats, a mean over entries
    (Hinton et al. 2015, arXiv 1503.02531). T^2 keeps the size of the gradient when T changes.

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


def match_logits(
    student: Tensor,
    teacher: Tensor | TopLogits,
    temperature: float = 1.0,
    lambda_mse: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """1/2 (KL(p || q) T^2 + lambda MSE(z_t, z_s)) on logits [..., C], a mean over entries.

    With T = 1 the KL alone is blind to a constant added to all logits of an entry; the MSE is not.

    Given the teacher's :class:`TopLogits` (at this temperature), the divergence is that of k + 1 events, each of the k
    and any other one: at most the whole divergence, equal to it for k = C. The MSE then looks at the k logits.
    """
    if isinstance(teacher, TopLogits):
        loss = _top_kl(student, teacher, temperature, mask)
        if lambda_mse:
            ours = student.gather(-1, teacher.indices.long())
            loss = loss + lambda_mse * logit_mse(ours, teacher.values, mask)
        return loss / 2
    loss = soft_kl(student, teacher, temperature, mask)
    if lambda_mse:
        loss = loss + lambda_mse * logit_mse(student, teacher, mask)
    return loss / 2


def keep_top(logits: Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    """The ``k`` largest of logits [..., C], to be compared at this temperature."""
    top = logits.topk(min(k, logits.shape[-1]))
    others = logits.scatter(-1, top.indices, float("-inf"))
    return TopLogits(top.values, top.indices, (others / temperature).logsumexp(-1))


def label_ce(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [..., C] with the true labels [...], a mean over the entries that have one; 0 without.

    An entry with the label :data:`IGNORED` (among fractions NaN) has none. Where there is but one logit, C = 1, it is
    a number that is asked for: the mean squared error.
    """
    known = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
    if not bool(known.any()):
        return student.sum() * 0  # stays in the graph
    if student.shape[-1] == 1:
        return functional.mse_loss(student[known].squeeze(-1), labels[known].to(student.dtype))
    return functional.cross_entropy(student[known], labels[known].long())


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference of hidden states [B, T, d], relative to the mean square of the teacher's.

    0 for equal states, 1 for a student that says 0; so one weight serves layers and models of any scale
    (TinyBERT, Jiao et al. 2019, arXiv 1909.10351, uses the plain MSE). ``mask`` is [B, T].
    """
    theirs = _select(teacher, mask)
    return functional.mse_loss(_select(student, mask), theirs) / theirs.square().mean().clamp(min=1e-12)


def relation(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of the relations between the tokens of a text, in nats, a mean over tokens and heads.

    A relation is the softmax of A A^T / sqrt(d / heads), with A the queries, the keys or the values [B, T, d] of one
    layer, cut into ``heads`` equal pieces (MiniLMv2, Wang et al. 2020, arXiv 2012.15828). Only the number of heads must
    be the same on both sides, so it serves models of any width and any number of attention heads, and any attention
    implementation. ``mask`` is [B, T]; padding is no part of a relation.
    """
    valid = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
    valid = valid if mask is None else mask.bool()
    ours, theirs = (_log_relation(states, heads, valid) for states in (student, teacher))
    pairs = (valid[:, :, None] & valid[:, None, :])[:, None].expand_as(ours)
    each = torch.where(pairs, theirs.exp() * (theirs - ours).masked_fill(~pairs, 0), 0)
    return each.sum() / (heads * valid.sum().clamp(min=1))


def embedding_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the embeddings [B, d], averaged over the batch; between 0 and 2.

    Computed as half the squared distance of the unit vectors: the same value, but exactly 0 for equal
    embeddings.
    """
    difference = functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)
    return difference.square().sum(-1).mean() / 2


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines between the texts of a batch, [B, d] each; 0 for B < 2. Of images and
    their texts [B, 2, d] it is that between any two of them.

    Compares S S^T with the teacher's, off the diagonal (similarity-preserving distillation, Tung, Mori 2019,
    arXiv 1907.09682). It asks for the teacher's geometry, not its axes, so it also serves when d differs.
    """
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    size = len(student)
    if size < 2:
        return student.sum() * 0  # stays in the graph, so that a batch of one still has a gradient
    ours, theirs = (functional.normalize(x, dim=-1) for x in (student, teacher))
    # The diagonals are 1 - 1 up to rounding; counting only the B (B - 1) others makes the value independent
    # of B.
    off_diagonal = ~torch.eye(size, dtype=torch.bool, device=student.device)
    return (ours @ ours.T - theirs @ theirs.T)[off_diagonal].square().mean()


def value_error(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Absolute difference of numbers [B, N, d], relative to the mean size of the teacher's: 0 for equal models, 1 for a
    student that says 0. ``weights`` [B, N]: how much each of the N counts (a box in which there is something, a patch
    that was hidden); None: all alike.
    """
    counted = torch.ones_like(teacher[..., 0]) if weights is None else weights.to(teacher.dtype)
    apart = ((student - teacher).abs().mean(-1) * counted).sum()
    return apart / (teacher.abs().mean(-1) * counted).sum().clamp(min=1e-12)


def contrast(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL T^2 of which text of the batch belongs to an image, and of which image to a text, a mean of both directions.

    ``student``, ``teacher``: [B, 2, d], an image and its text, whose products are the logits (Radford et al. 2021,
    arXiv 2103.00020); their widths may differ. The softened matrix of the whole batch is compared, not only its
    diagonal (as in TinyCLIP, Wu et al. 2023, arXiv 2309.12314). 0 for B < 2.
    """
    ours, theirs = (pairs[:, 0] @ pairs[:, 1].T for pairs in (student, teacher))
    return (soft_kl(ours, theirs, temperature) + soft_kl(ours.T, theirs.T, temperature)) / 2


def _top_kl(student: Tensor, teacher: TopLogits, temperature: float, mask: Tensor | None) -> Tensor:
    """KL T^2 between the distributions over the k kept classes and, as one event, all others."""
    values, indices, rest = (_select(part, mask) for part in teacher)
    ours = _select(student, mask) / temperature
    q, p = ours.gather(-1, indices.long()), values / temperature
    if values.shape[-1] < student.shape[-1]:
        others = ours.scatter(-1, indices.long(), float("-inf")).logsumexp(-1, keepdim=True)
        q, p = torch.cat([q, others], -1), torch.cat([p, rest[..., None]], -1)
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean() * temperature**2


def _log_relation(states: Tensor, heads: int, valid: Tensor) -> Tensor:
    """[B, T, d] -> [B, heads, T, T], the log-probabilities of each token's relations to the valid ones."""
    size, length, width = states.shape
    pieces = (
        states.masked_fill(~valid[..., None], 0).view(size, length, heads, width // heads).transpose(1, 2)
    )
    scores = pieces @ pieces.transpose(2, 3) / (width // heads) ** 0.5
    return scores.masked_fill(~valid[:, None, None, :], float("-inf")).log_softmax(-1)


def _select(values: Tensor, mask: Tensor | None) -> Tensor:
    """The entries that count, [n, ...]. Selecting, not multiplying, keeps inf and nan in padding out."""
    return values if mask is None else values[mask.bool()]
