"""What bench measures: a model folder or an ONNX export behind one face.  Importing it loads no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layershare.errors import ModelError
from layershare.onnx.runner import MANIFEST

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """An open model.

    Attributes:
        engine: ``PyTorch`` or ``ONNX Runtime``.
        precision: of the weights.
        config: as in config.json.
        known: names of its inputs.
        run: one forward pass of arrays.
        generate: (ids, mask, number of new tokens) -> nothing; None for models that do not generate.
    """

    engine: str
    precision: str
    config: Mapping[str, Any]
    known: frozenset[str]
    run: Callable[[Arrays], object]
    generate: Callable[[np.ndarray, np.ndarray, int], object] | None

    def inputs(self, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Random inputs of this size: the same for equal configs."""
        draw = np.random.default_rng(0)
        if "pixel_values" in self.known:
            size = self.config["image_size"]
            shape = (size, size) if isinstance(size, int) else tuple(size)
            pixels = draw.standard_normal((batch, self.config.get("num_channels", 3), *shape))
            return {"pixel_values": pixels.astype(np.float32)}
        high = _vocabulary(self.config)
        ids = draw.integers(high // 2, high, (batch, tokens))
        every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        return {
            name: array for name, array in every.items() if name in self.known or name != "token_type_ids"
        }


def _vocabulary(config: Mapping[str, Any]) -> int:
    """Tokens that the model knows; where its parts have configs of their own, those that all of them know."""
    parts = (
        [config] if "vocab_size" in config else [one for one in config.values() if isinstance(one, Mapping)]
    )
    if found := [one["vocab_size"] for one in parts if "vocab_size" in one]:
        return min(found)
    raise ModelError("The model's config names no vocab_size.")


def is_export(folder: str | Path) -> bool:
    """Whether the folder was written by ``layershare export --format onnx``."""
    return (Path(folder) / MANIFEST).is_file()


def open_subject(folder: str | Path, threads: int | None = None) -> Subject:
    """Open an export, or a model folder in the precision of its checkpoint. ``threads``: of ONNX Runtime.

    Raises ModelError or StoreError.
    """
    return _exported(folder, threads) if is_export(folder) else _model(folder)


def _exported(folder: str | Path, threads: int | None) -> Subject:
    from layershare.onnx import load

    runner = load(folder, threads=threads)
    generates = runner.kind in ("decoder", "encoder-decoder")

    def generate(ids: np.ndarray, mask: np.ndarray, new: int) -> object:
        runner.eos = []  # so that every model makes as many tokens
        return runner.generate_ids(ids, mask, max_new_tokens=new)

    def run(arrays: Arrays) -> object:
        return (
            next(runner.steps(arrays["input_ids"], arrays["attention_mask"]))
            if generates
            else runner(**arrays)
        )

    first = next(iter(runner.sessions.values()))
    precision = "int8" if runner.int8 else "float32"
    known = frozenset(one.name for one in first.get_inputs())
    return Subject("ONNX Runtime", precision, runner.config, known, run, generate if generates else None)


def _model(folder: str | Path) -> Subject:
    import inspect

    import torch

    from layershare.store.open import load_model

    model: Any = load_model(folder)
    takes = frozenset(inspect.signature(model.forward).parameters)
    seq2seq = getattr(model.config, "is_encoder_decoder", False)

    @torch.inference_mode()
    def run(arrays: Arrays) -> object:
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items() if name in takes}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        if seq2seq:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :1]
        return model(**inputs)

    def generate(ids: np.ndarray, mask: np.ndarray, new: int) -> object:
        return model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, num_beams=1, pad_token_id=0,
        )  # fmt: skip

    precision = str(model.dtype).removeprefix("torch.")
    config = model.config.to_dict()
    known = frozenset({"pixel_values"} if model.main_input_name == "pixel_values" else takes)
    return Subject("PyTorch", precision, config, known, run, generate if model.can_generate() else None)
