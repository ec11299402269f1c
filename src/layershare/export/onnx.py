"""ONNX export: every weight one initialiser, asserted; outputs compared with PyTorch before anything is kept."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from layershare.errors import DependencyError, LayershareError, ModelError, StoreError
from layershare.exits.store import SETTINGS
from layershare.exits.store import load as load_exits
from layershare.export.compare import compare
from layershare.export.programs import Program, kind_of, programs
from layershare.onnx.runner import MANIFEST, load
from layershare.onnx.sources import DUAL
from layershare.result import write_atomic
from layershare.sharing import plan_of
from layershare.sharing.carry import unmark
from layershare.sharing.tie import count
from layershare.store.open import copy_preprocessing, load_model, load_tokenizer, new_folder
from layershare.tasks.encoding import usable_length
from layershare.tasks.pooling import POOLINGS, pooling_of

if TYPE_CHECKING:
    import onnx_ir as ir

SLACK = 1.02
"""Most bytes of initialisers, as a multiple of the model's unique bytes; small constants of the graph come on top."""
OPSET = 23
"""The first that has attention, rotary embeddings and root mean square norms as single operators: half the nodes."""
TOLERANCE = 1e-3
"""Most difference of float outputs, relative to the largest output."""
BEYOND_GREEDY = ("forced_bos_token_id", "bad_words_ids")
"""Settings of a generation config with which greedy search gives other tokens; the runner does not follow them."""


@dataclass(frozen=True)
class OnnxExport:
    """What was written. Bytes are those of initialisers, and of files.

    ``products`` are matrix products with a weight, ``shared`` those whose weight serves others too, ``quantized`` those
    in int8. ``difference`` is the largest one between outputs of PyTorch and ONNX Runtime, ``scale`` the largest
    output, ``agreement`` how far both say the same: mean cosine of hidden states, or share of equal best classes or
    greedily decoded tokens.
    """

    out: str
    kind: str
    bytes_unique: int
    bytes_stored: int
    bytes_on_disk: int
    products: int
    shared: int
    quantized: int
    difference: float
    scale: float
    agreement: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        unique, stored, disk = (n / 1e6 for n in (self.bytes_unique, self.bytes_stored, self.bytes_on_disk))
        int8 = f", {self.quantized} in int8" if self.quantized else ""
        return (
            f"{stored:,.1f} MB of initialisers for {unique:,.1f} MB of unique weights, {disk:,.1f} MB on disk.\n"
            f"{self.products} products with weights{int8}; {self.shared} of them share their weight with others.\n"
            f"Outputs differ from PyTorch's by at most {self.difference:.1e} (the largest is {self.scale:.3g}); "
            f"agreement {self.agreement:.4f}."
        )


def to_onnx(folder: Path, out: Path, *, int8: bool = False) -> OnnxExport:
    """Write the model in ``folder``, shared or not, as ONNX graphs into ``out``, with its tokenizer and config.

    ``int8``: weights, and the activations that meet them, as bytes (dynamic quantisation).
    Raises DependencyError without the packages of ``layershare[onnx]``, ModelError for a model that cannot be exported,
    StoreError if there is something in ``out``, or where a weight was written twice, a product was not quantised or,
    without ``int8``, outputs differ (nothing is left then). With ``int8`` they do: by how much is in what is returned.
    """
    _require()
    from layershare.export import attention, graph, staged
    from layershare.export.int8 import quantize

    with new_folder(out) as part:
        early = load_exits(folder).float() if (Path(folder) / SETTINGS).is_file() else None
        model = load_model(folder).float() if early is None else early.model
        tokenizer = None
        with contextlib.suppress(ModelError):
            tokenizer = load_tokenizer(folder)
        said = _manifest(model, tokenizer)
        names = _names(model, folder, tokenizer)
        parts = programs(model, names)
        if early is not None:
            parts = [replace(part_of, module=staged.Stages(early)) for part_of in parts]
        graphs = {program.name: trace(program) for program in parts}
        for made in graphs.values():
            attention.join_heads(made)
            graph.tidy(made)
            attention.spread_angles(made)
        unique = _unique_bytes(model) + (0 if early is None else count(early.heads).bytes_unique)
        _refuse_copies(graph.stored(graphs.values(), graph.MATRIX), unique)
        if int8:
            for made in graphs.values():
                quantize(made)
        products = [node.op_type for made in graphs.values() for node, _ in graph.products(made)]
        quantized = products.count("MatMulIntegerToFloat")
        if int8 and quantized < len(products):
            raise StoreError(f"{len(products) - quantized} of {len(products)} products were not quantised.")
        shared = graph.shared(graphs.values())
        if early is not None:
            assert isinstance(early.threshold, float)
            staged.nest(graphs["model"], early.threshold)
        files = graph.save(graphs, part)
        exits = [] if early is None else list(early.positions)
        _write_beside(model, folder, part, said | {"graphs": files, "int8": int8, "exits": exits})
        found = compare(model, load(part), early)
        if not int8 and not found.difference <= TOLERANCE * found.scale:
            raise StoreError(
                f"outputs of the graph differ from those of {folder} by {found.difference:.1e}: it was not kept."
            )
        return OnnxExport(
            out=str(out),
            kind=kind_of(model),
            bytes_unique=unique,
            bytes_stored=graph.stored(graphs.values()),
            bytes_on_disk=sum(file.stat().st_size for file in part.glob("*.onnx*")),
            products=len(products),
            shared=shared,
            quantized=quantized,
            **asdict(found),
        )


def trace(program: Program) -> "ir.Model":
    """The graph of a program, as the exporter of transformers makes it. Raises ModelError with its reason."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    module: Any = program.module  # no PreTrainedModel, which the exporter does not need
    config = OnnxConfig(dynamic_shapes=_dynamic(program.axes), opset_version=OPSET)
    try:
        with _quiet():
            return OnnxExporter().export_program(module, dict(program.example), config)[0]
    except LayershareError:
        raise
    except Exception as error:  # anything may come out of a tracer
        reason = " ".join(str(error).split())[:200]
        name = type(module.model).__name__
        raise ModelError(f"{name} cannot be exported to ONNX ({type(error).__name__}: {reason}).") from error


def _dynamic(axes: Any) -> Any:
    if isinstance(axes, tuple):
        return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    return {name: _dynamic(inner) for name, inner in axes.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter says a great deal that helps nobody."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _unique_bytes(model: PreTrainedModel) -> int:
    return count(model).bytes_unique + sum(buffer.nbytes for buffer in model.buffers())


def _refuse_copies(stored: int, unique: int) -> None:
    if stored > SLACK * unique:
        raise StoreError(
            f"the graph stores {stored:,} bytes of weights where the model has {unique:,}: it was not kept.",
            "Some weight was written more than once; please report the model and its plan.",
        )


def _manifest(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """What the runner has to know of the model. Raises ModelError where its decoder has no start token."""
    kind, config = kind_of(model), model.config
    settings = model.generation_config if model.can_generate() else None
    eos = getattr(settings, "eos_token_id", None)
    starts = (getattr(one, "decoder_start_token_id", None) for one in (settings, config))
    start = next((token for token in starts if token is not None), None)
    if kind == "encoder-decoder" and start is None:
        raise ModelError(
            f"{type(model).__name__} has no decoder_start_token_id.", "Set it in its generation_config.json."
        )
    limit = 512 if kind in ("encoder", DUAL) else 10**6
    beyond = [name for name in BEYOND_GREEDY if getattr(settings, name, None) not in (None, [])]
    told, languages = _told(settings)
    return {
        "kind": kind,
        "eos": [] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        "start": [] if start is None else [start, *told],
        "languages": languages,
        "barred": getattr(settings, "suppress_tokens", None) or [],
        "barred_first": getattr(settings, "begin_suppress_tokens", None) or [],
        "beyond_greedy": beyond,
        "pooling": _pooling(model) if kind == "encoder" else None,
        "pad": getattr(tokenizer, "pad_token_id", None),
        "scale": model.logit_scale.exp().item() if kind == DUAL else None,  # type: ignore[operator]
        "bias": float(getattr(model, "logit_bias", torch.zeros(())).item()) if kind == DUAL else None,
        "max_length": usable_length(tokenizer, config, limit) if tokenizer is not None else None,
    }


def _told(settings: Any) -> tuple[list[int], list[int]]:
    """What Whisper's decoder is told behind its start: the language, the task, and to write no times; and the languages
    to choose from, which then goes in front, where the config names none."""
    silent: int | None = getattr(settings, "no_timestamps_token_id", None)
    told = [] if silent is None or getattr(settings, "return_timestamps", None) else [silent]
    if not getattr(settings, "is_multilingual", None):
        return told, []
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    told = [settings.task_to_id[getattr(settings, "task", None) or "transcribe"], *told]
    language = str(getattr(settings, "language", None)).lower().strip("<|>")
    known = settings.lang_to_id.get(f"<|{TO_LANGUAGE_CODE.get(language, language)}|>")
    return (told, sorted(settings.lang_to_id.values())) if known is None else ([known, *told], [])


def _names(model: PreTrainedModel, folder: Path, tokenizer: Any) -> Sequence[str]:
    """What comes with the model's main input."""
    if model.main_input_name == "input_ids":
        return tokenizer.model_input_names if tokenizer is not None else ("attention_mask",)
    try:
        said = json.loads((Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        said = {}
    return ("attention_mask",) if said.get("return_attention_mask", True) else ()


def _pooling(model: PreTrainedModel) -> str | None:
    """The name in ``POOLINGS`` of the model's pooling; None if it is not computed."""
    try:
        pooling = pooling_of(model.config)
    except ModelError:
        return None
    return next(name for name, one in POOLINGS.items() if one is pooling)


def _write_beside(model: PreTrainedModel, folder: Path, part: Path, manifest: Mapping[str, Any]) -> None:
    """The config without the plan, what prepares inputs, and what the runner has to know."""
    if plan_of(model) is not None:
        unmark(model)
    model.config.save_pretrained(part)
    copy_preprocessing(folder, part)
    write_atomic(part / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _require() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime", "transformers.exporters"):
        if find_spec(name) is None:
            raise DependencyError(f"an export to ONNX needs {name}.", "pip install layershare[onnx]")
