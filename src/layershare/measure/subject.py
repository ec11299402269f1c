"""What bench measures: a model folder or an ONNX export behind one face.  Importing it loads no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layershare.onnx.runner import MANIFEST
from layershare.onnx.sources import DUAL, MAIN, MASKED, is_dual, source

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """An open model.

    Attributes:
        engine: ``PyTorch`` or ``ONNX Runtime``.
        precision: of the weights.
        config: as in config.json.
        main: names of what it reads: one, or an image beside a text.
        known: names of its inputs.
        run: one forward pass of arrays.
        generate: (inputs, number of new tokens) -> nothing; None for models that do not generate.
    """

    engine: str
    precision: str
    config: Mapping[str, Any]
    main: Sequence[str]
    known: frozenset[str]
    run: Callable[[Arrays], object]
    generate: Callable[[Arrays, int], object] | None

    def inputs(self, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Random inputs of this size: the same for equal configs. ``tokens`` are frames where the model hears."""
        made = {name: source(self.config, name, batch, tokens) for name in self.main}
        for name in MASKED:
            if name in made and made[name].ndim == 2:
                made["attention_mask"] = np.ones(made[name].shape, np.int64)
        if "input_ids" in made:
            made["token_type_ids"] = np.zeros_like(made["input_ids"])
        return {name: array for name, array in made.items() if name in self.known or name != "token_type_ids"}

    @property
    def positions(self) -> int | None:
        """How many tokens it reads at most; None where its config does not say, or it reads no text."""
        parts = (self.config, self.config.get("text_config") or {})
        known = (part.get("max_position_embeddings") for part in parts)
        return next((one for one in known if one), None) if "input_ids" in self.main else None


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

    def generate(arrays: Arrays, new: int) -> object:
        runner.eos = []  # so that every model makes as many tokens
        return runner.generate_ids(arrays, max_new_tokens=new)

    def run(arrays: Arrays) -> object:
        if generates:
            return next(runner.steps(arrays))
        return [runner(name, **arrays) for name in runner.sessions]

    sessions = list(runner.sessions.values())
    reading = sessions if runner.kind == DUAL else sessions[:1]
    precision = "int8" if runner.int8 else "float32"
    known = frozenset(one.name for session in reading for one in session.get_inputs())
    main = [name for name in MAIN if name in known]
    return Subject(
        "ONNX Runtime", precision, runner.config, main, known, run, generate if generates else None
    )


def _model(folder: str | Path) -> Subject:
    import inspect

    import torch
    from transformers import GenerationMixin

    from layershare.store.open import load_model

    model: Any = load_model(folder)
    main = model.main_input_name
    takes = frozenset(inspect.signature(model.forward).parameters)
    seq2seq = "decoder_input_ids" in takes

    @torch.inference_mode()
    def run(arrays: Arrays) -> object:
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items() if name in takes}
        inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        if seq2seq:
            inputs["decoder_input_ids"] = torch.ones((len(inputs[main]), 1), dtype=torch.long)
        return model(**inputs)

    def generate(arrays: Arrays, new: int) -> object:
        inputs: Any = {name: torch.from_numpy(array) for name, array in arrays.items() if name in takes}
        return GenerationMixin.generate(  # Whisper's own does more
            model,
            **inputs,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )

    precision = str(model.dtype).removeprefix("torch.")
    config = model.config.to_dict()
    reads = ["input_ids", "pixel_values"] if is_dual(model) else [main]
    return Subject(
        "PyTorch", precision, config, reads, takes, run, generate if model.can_generate() else None
    )
