"""Compute of one forward pass, counted, not timed."""

from collections.abc import Mapping
from typing import Any


def flops(model: Any, batch: Mapping[str, Any]) -> int:
    """Floating point operations of ``model(**batch)``: 2 per multiply-add, matrix products only.

    ``batch`` holds tensors of shape [texts, tokens]; padding counts, because it is computed.  The number
    depends on the positions that run and not on how many of them share weights.  While counting, attention
    runs as plain matrix products: ``torch.utils.flop_counter`` does not see the fused CPU kernel.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    model.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**batch)
    finally:
        model.train(training)
    return int(counter.get_total_flops())
