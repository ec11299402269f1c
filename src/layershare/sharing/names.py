"""Under which names a shared model is stored: its own, wherever transformers would convert what is shared.

transformers rewrites some checkpoints when it loads and saves: it splits a fused map into several, or permutes its
rows. A factor is no such map, and of maps that are tied only some may be stored. So the conversions that would touch
them are left out, when a shared model is saved and when it is loaded.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter

from layershare.linear import FACTORS, ORDER
from layershare.sharing.layout import Layout


def kept_conversions(conversions: Iterable[Any], layout: Layout) -> list[Any]:
    """Those of transformers' ``conversions`` that leave factors alone, and do not split a map into shared ones."""
    factors = [
        f"{name}.{leaf}"
        for job in layout.jobs
        if job.factored
        for name in job.modules
        for leaf in (*FACTORS, ORDER)
    ]
    shared = [name for job in layout.jobs for name in job.names]
    return [
        one
        for one in conversions
        if not isinstance(one, WeightConverter)
        or not _makes(one, factors + (shared if len(one.target_patterns) > 1 else []))
    ]


def keep_names(model: nn.Module, layout: Layout) -> None:
    """Let ``save_pretrained`` convert only what :func:`kept_conversions` leaves."""
    if not isinstance(model, PreTrainedModel):
        return
    known = getattr(model, "_weight_conversions", None)
    if known is None:  # not loaded from a file: what transformers would take then
        every = get_model_conversion_mapping(model, add_legacy=False)
        known = [one for one in every if not isinstance(one, PrefixChange)]
    if len(kept := kept_conversions(known, layout)) < len(known):
        model._weight_conversions = kept  # type: ignore[assignment]


def _makes(converter: WeightConverter, names: list[str]) -> bool:
    back = converter.reverse_transform()
    return any(back.rename_source_key(name)[1] is not None for name in names)
