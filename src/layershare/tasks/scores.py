"""How good answers are: of one label an input, of several, of numbers."""

from collections.abc import Callable, Sequence
from typing import Any

from layershare.errors import DataError


def _single(true: Sequence[int], said: Sequence[int]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(true, said)),
        "macro_f1": float(f1_score(true, said, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(true, said)),
    }


def _several(true: Sequence[Sequence[float]], said: Sequence[Sequence[int]]) -> dict[str, float]:
    from sklearn.metrics import f1_score

    whole = [[int(x) for x in row] for row in true]
    return {
        "macro_f1": float(f1_score(whole, said, average="macro", zero_division=0)),
        "accuracy": sum(a == list(b) for a, b in zip(whole, said, strict=True)) / len(whole),
    }


def correlations(true: Sequence[float], said: Sequence[float]) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    if len(true) < 2 or len(set(true)) < 2:
        raise DataError("The test data needs at least two rows with different scores for a correlation.")
    if len(set(said)) < 2:  # a model that says the same of all texts knows nothing
        return {"spearman": 0.0, "pearson": 0.0}
    return {
        "spearman": float(spearmanr(said, true).statistic),
        "pearson": float(pearsonr(said, true).statistic),
    }


METRICS: dict[str, Callable[[Any, Any], dict[str, float]]] = {
    "label": _single,
    "labels": _several,
    "score": correlations,
}
