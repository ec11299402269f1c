"""Figures without a stopwatch: quality that is already known, and sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layershare.measure.size import bytes_on_disk
from layershare.result import Figures


def brief(label: str, model: Any, metrics: Mapping[str, float], folder: str | Path | None = None) -> Figures:
    """The parameters of ``model`` beside its ``metrics``; bytes on disk if ``folder`` is given. Runs nothing."""
    from layershare.sharing import count

    counts = count(model)
    return Figures(
        label=label,
        metrics=dict(metrics),
        parameters_unique=counts.unique,
        parameters_effective=counts.effective,
        layer_parameters_unique=counts.layer_unique,
        layer_parameters_effective=counts.layer_effective,
        bytes_on_disk=None if folder is None else bytes_on_disk(folder),
    )
