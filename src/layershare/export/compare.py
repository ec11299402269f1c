"""Whether exported graphs say what the model says, on inputs of other shapes than those that were traced."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from layershare.exits.curve import NEVER
from layershare.exits.model import EarlyExit
from layershare.onnx.runner import Runner
from layershare.onnx.sources import DUAL, source

ROWS, TOKENS, NEW = 3, 7, 8


@dataclass(frozen=True)
class Comparison:
    """See :class:`layershare.export.onnx.OnnxExport`."""

    difference: float
    scale: float
    agreement: float


@torch.no_grad()
def compare(model: PreTrainedModel, runner: Runner, early: EarlyExit | None = None) -> Comparison:
    """Run both on the same random inputs, some of them padded; a model that generates also from its cache.

    With ``early`` the graph has exits: compared are full depth, and then the first exit.
    """
    main = model.main_input_name
    known = {one.name for session in runner.sessions.values() for one in session.get_inputs()}
    if main != "input_ids":
        read = {main: torch.from_numpy(source(model.config.to_dict(), main, ROWS, TOKENS))}
        if "attention_mask" in known:
            mask = torch.ones(read[main].shape, dtype=torch.long)
            mask[0, mask.shape[1] * 2 // 3 :] = 0
            read = {main: read[main] * mask, "attention_mask": mask}
        if runner.kind == "encoder-decoder":
            return _steps(model, runner, read)
        return _outputs(model(**read), runner(**{name: one.numpy() for name, one in read.items()}))
    ids = torch.from_numpy(source(model.config.to_dict(), main, ROWS, TOKENS))
    mask = torch.ones_like(ids)
    if runner.kind == "decoder":
        mask[0, :3] = 0  # prompts are padded on the left
        return _steps(model, runner, {"input_ids": ids, "attention_mask": mask})
    mask[0, -3:] = 0
    if runner.kind == "encoder-decoder":
        return _steps(model, runner, {"input_ids": ids, "attention_mask": mask})
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    inputs = {name: tensor for name, tensor in inputs.items() if name in known}
    kept = mask.bool() if "attention_mask" in known else None
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    if runner.kind == DUAL:
        pixels = source(model.config.to_dict(), "pixel_values", ROWS, TOKENS)
        wanted = model(**inputs, pixel_values=torch.from_numpy(pixels))
        return _outputs(wanted, runner("text", **arrays) | runner("image", pixel_values=pixels))
    if early is None:
        return _outputs(model(**inputs), runner(**arrays), kept)
    before, runner.threshold = runner.threshold, NEVER
    full = _outputs(model(**inputs), {"logits": runner(**arrays)["logits"]})
    runner.threshold = 0.0
    forced = EarlyExit(early.model, early.heads, 0.0, early.tail)
    first = _outputs(forced(**inputs), {"logits": runner(**arrays)["logits"]})
    runner.threshold = before
    return max(full, first, key=lambda found: found.difference)


def _outputs(wanted: Any, found: dict[str, np.ndarray], mask: Tensor | None = None) -> Comparison:
    """Of several outputs the one that differs most, by its size."""
    compared = [_output(name, wanted[name], array, mask) for name, array in found.items()]
    return max(compared, key=lambda one: one.difference / max(one.scale, 1e-12))


def _output(name: str, wanted: Tensor, found: np.ndarray, mask: Tensor | None) -> Comparison:
    one, other = wanted.double(), torch.from_numpy(found).double()
    if mask is not None and one.shape[:2] == mask.shape:  # padding has states, but they mean nothing
        one, other = one[mask], other[mask]
    if name == "logits":
        agreement = (one.argmax(-1) == other.argmax(-1)).double().mean()
    else:
        agreement = torch.cosine_similarity(one, other, dim=-1).mean()
    return Comparison(float((one - other).abs().max()), float(one.abs().max()), float(agreement))


def _steps(model: Any, runner: Runner, read: Mapping[str, Tensor]) -> Comparison:
    """Decode greedily with PyTorch, and score its tokens with the graph, one after the other, from the cache."""
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    inputs: dict[str, Any] = dict(read)
    if runner.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.tensor([runner.start] * ROWS)
    # Whisper's own search does more than search.
    made: Any = GenerationMixin.generate(model, **inputs, generation_config=settings)
    logits = torch.stack(made.logits, dim=1)
    count = logits.shape[1]  # fewer than NEW where all rows have ended
    tokens = made.sequences[:, -count:]
    steps = runner.steps({name: one.numpy() for name, one in read.items()}, start=runner.start)
    scores = [next(steps)]
    scores += [steps.send(tokens[:, i].numpy()) for i in range(count - 1)]
    other = torch.from_numpy(np.stack(scores, axis=1))
    agreement = (logits.argmax(-1) == other.argmax(-1)).double().mean()
    return Comparison(float((logits - other).abs().max()), float(logits.abs().max()), float(agreement))
