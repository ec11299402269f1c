"""What sharing is worth when a model is served: latency, memory and bytes of exported models, shared beside dense.

    python benchmarks/deploy.py [--work FOLDER] [--threads 1] [--seconds 10] [--docs docs/benchmarks.md]

Models of 12 layers with random weights (speed and memory do not depend on them), dense and with few unique layers
(neighbours share), as folders for PyTorch and as ONNX exports, timed in turns. Beside them the probe: the weight
products of the layers alone, through the same engine, which is the most that fewer unique layers can spare. Quality
after quantisation is measured on the packaged all-MiniLM-L6-v2 with pairs of STS-B. --work keeps the exports for the
next run.
"""

import argparse
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from page import write

from layershare import make_plan, share
from layershare.demo import model_folder, write_data
from layershare.export import export, graph
from layershare.export.int8 import quantize
from layershare.measure.bench import Bench, Row, bench
from layershare.measure.latency import latency
from layershare.onnx import load
from layershare.onnx.session import open_session
from layershare.sharing import count
from layershare.store.open import load_model, load_tokenizer
from layershare.tasks import get_task

TITLE = "## Serving shared models"
DEPTH, TOKENS, NEW, WORDS, PAIRS = 12, 12, 32, 8000, 500
JOBS = [("encoder", 384), ("encoder", 768), ("decoder", 384), ("decoder", 768)]
FP32 = "float32, ONNX"
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where models and exports are kept; default: nowhere")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine, with one thread"
    )
    parser.add_argument("--docs", type=Path, help="write the result to this section of a page")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = options.work or Path(tempfile.mkdtemp())
    try:
        lines = [said for job in JOBS for said in section(*job, work, options)]
        page = "\n".join([*head(options), *lines, *quality(work), f"    {command(options)}", ""])
    finally:
        if options.work is None:
            shutil.rmtree(work)
    print(page)
    if options.docs:
        write(options.docs, page)


def section(kind: str, width: int, work: Path, options: argparse.Namespace) -> list[str]:
    """The table of one kind of model and one width, and what it says."""
    folders = {unique: model(kind, width, unique, work) for unique in (DEPTH, 3, 1)}
    named = {"dense, PyTorch": folders[DEPTH], "3 unique, PyTorch": folders[3]}
    for unique, folder in folders.items():
        label = "dense" if unique == DEPTH else f"{unique} unique"
        if kind == "encoder" and unique > 1:
            named[f"{label}, {FP32}"] = exported(folder, int8=False)
        named[f"{label}, int8"] = exported(folder, int8=True)
    made = bench(
        named, tokens=TOKENS, new=NEW, batch=1, threads=options.threads, runs=400, seconds=options.seconds,
        clock=CLOCKS[options.clock],
    )  # fmt: skip
    limits = probe(width, TOKENS if kind == "encoder" else 1, options)
    ends = probe(width, 1, options, WORDS) if kind == "decoder" else {}
    rows = {row.label: row for row in made.rows}

    def gain(label: str, base: str) -> str:
        return f"{time_of(rows[base]) / time_of(rows[label]):.2f}"

    said = "; ".join(
        f"{unique} unique {gain(f'{unique} unique, int8', 'dense, int8')} times as fast as dense (probe "
        f"{limits[unique]:.2f}{f', with the output layer {ends[unique]:.2f}' if ends else ''})" for unique in (3, 1)
    )  # fmt: skip
    what = "one pass" if kind == "encoder" else f"{NEW} tokens from a prompt of {TOKENS}"
    lines = [
        f"### {kind.capitalize()}, width {width}", "", made.table(), "",
        f"int8, {what}: {said}; 3 unique {gain('3 unique, int8', 'dense, PyTorch')} times as fast as dense PyTorch.",
    ]  # fmt: skip
    if kind == "encoder":
        lines.append(
            f"float32: 3 unique {gain(f'3 unique, {FP32}', f'dense, {FP32}')} times as fast as dense."
        )
    return [*lines, *memory(made, folders), ""]


def memory(made: Bench, folders: dict[int, Path]) -> list[str]:
    """Resident bytes by unique bytes of the model with three unique layers."""
    unique = count(load_model(folders[3])).bytes_unique
    said = [
        f"{row.label} {row.resident_bytes / (unique / 4 if 'int8' in row.label else unique):.2f}"
        for row in made.rows
        if row.label.startswith("3 unique") and row.resident_bytes
    ]
    return [
        f"Resident memory as a multiple of the unique bytes (int8: a quarter of them): {', '.join(said)}."
    ]


def time_of(row: Row) -> float:
    return (row.decode or row.latency).p50_ms


def model(kind: str, width: int, unique: int, work: Path) -> Path:
    """A saved model with random weights."""
    folder = work / f"{kind}-{width}-{unique}"
    if folder.exists():
        return folder
    torch.manual_seed(0)
    heads = width // 64
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": width,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": heads,
    }
    if kind == "encoder":
        config = transformers.BertConfig(**sizes, intermediate_size=4 * width)
        made = transformers.BertForMaskedLM(config).bert
    else:
        config = transformers.LlamaConfig(
            **sizes, intermediate_size=8 * width // 3, num_key_value_heads=heads
        )
        made = transformers.LlamaForCausalLM(config)
    made.eval()
    if unique < DEPTH:
        made = share(made, make_plan(made, "adjacent", unique=unique))
    made.save_pretrained(folder)
    return folder


def exported(folder: Path, *, int8: bool) -> Path:
    out = folder.with_name(f"{folder.name}-{'int8' if int8 else 'float32'}")
    if not out.exists():
        print(f"export {out.name}", flush=True)
        print(export(folder, out, "onnx", int8=int8), flush=True)
    return out


def probe(width: int, rows: int, options: argparse.Namespace, words: int = 0) -> dict[int, float]:
    """Unique layers -> how many times as fast as with all different, for the products of ``rows`` tokens alone; with
    those of an output layer of so many ``words``, which is read for every token whatever the layers share."""
    with tempfile.TemporaryDirectory() as scratch:
        calls = {
            str(unique): products(width, rows, unique, Path(scratch), options.threads, words)
            for unique in (DEPTH, 3, 1)
        }
        found = latency(calls, batch=1, runs=400, seconds=options.seconds, clock=CLOCKS[options.clock])
    return {int(name): found[str(DEPTH)].p50_ms / one.p50_ms for name, one in found.items()}


def products(
    width: int, rows: int, unique: int, folder: Path, threads: int, words: int = 0
) -> Callable[[], object]:
    """The products of twelve layers in a row, in int8, on ``rows`` rows of numbers, and of an output layer if any."""
    draw = np.random.default_rng(0)
    shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    weights = {
        (layer, i): ir.val(
            f"w{layer}.{i}", const_value=ir.tensor(draw.standard_normal(shape).astype(np.float32))
        )
        for layer in range(unique)
        for i, shape in enumerate(shapes)
    }
    first = last = ir.val("x", shape=ir.Shape([rows, width]), dtype=ir.DataType.FLOAT)
    nodes = []
    for position in range(DEPTH):
        for i in range(len(shapes)):
            nodes.append(ir.node("MatMul", [last, weights[position * unique // DEPTH, i]]))
            last = nodes[-1].outputs[0]
    if words:
        weights[unique, 0] = ir.val(
            "head", const_value=ir.tensor(draw.standard_normal((width, words)).astype(np.float32))
        )
        nodes.append(ir.node("MatMul", [last, weights[unique, 0]]))
        last = nodes[-1].outputs[0]
    last.name, last.dtype = "y", ir.DataType.FLOAT
    made = ir.Model(
        ir.Graph([first], [last], nodes=nodes, initializers=list(weights.values()), opset_imports={"": 20}),
        ir_version=10,
    )  # fmt: skip
    quantize(made)
    assert len({id(right) for _, right in graph.products(made)}) == len(weights)
    file = folder / f"probe-{unique}.onnx"
    ir.save(made, file)
    session, x = open_session(file, threads), draw.standard_normal((rows, width)).astype(np.float32)
    return lambda: session.run(None, {"x": x})


def quality(work: Path) -> list[str]:
    """Spearman's of the packaged model, and of one that shares, before and after export."""
    task, tokenizer = get_task("sentence-embedding"), load_tokenizer(model_folder())
    files = write_data(work / "sts-b")
    pairs = task.read([files["test"]], split=(1.0, 0.0, 0.0)).train.select(range(PAIRS))  # type: ignore[union-attr]
    original = load_model(model_folder(), task.auto_class)
    lines = ["| | PyTorch | ONNX, float32 | ONNX, int8 | bytes of int8 |", "|---|---:|---:|---:|---:|"]
    for name, preset in (("original", None), ("gated, 3 unique, not healed", "gated")):
        folder = work / ("minilm" if preset is None else f"minilm-{preset}")
        student = original if preset is None else share(original, make_plan(original, preset, unique=3))
        if not folder.exists():
            student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        figures = [task.evaluate(student, tokenizer, pairs)["spearman"]]
        sizes = []
        for int8 in (False, True):
            out = exported(folder, int8=int8)
            figures.append(spearman(load(out).encode, pairs))
            sizes.append((out / "model.onnx").stat().st_size)
        cells = " | ".join(f"{figure:.4f}" for figure in figures)
        lines.append(f"| {name} | {cells} | {sizes[1] / sizes[0]:.3f} of float32 |")
    return [f"### Quality: all-MiniLM-L6-v2, Spearman's on {PAIRS} test pairs of STS-B", "", *lines, ""]


def spearman(encode: Callable, pairs: Any) -> float:
    from scipy.stats import spearmanr

    left, right = encode(pairs["text"][:]), encode(pairs["text_pair"][:])
    return float(spearmanr((left * right).sum(1), pairs["score"][:]).statistic)


def head(options: argparse.Namespace) -> list[str]:
    busy = options.clock == "cpu"
    return [
        TITLE,
        "",
        f"Models of {DEPTH} layers with random weights, dense and with few unique layers (neighbours share),",
        f"{options.threads} thread(s), texts of {TOKENS} tokens, all sides of a table in turns; medians in ms with the",
        "95th percentile. The probe is the products of the layers' weights alone, with as many rows of numbers as the",
        "model sees tokens at once (decoding: one): the most that cached weights can spare."
        + (" Times are of the processor, as others used the machine." * busy),
        "",
    ]


def command(options: argparse.Namespace) -> str:
    said = f"--threads {options.threads} --seconds {options.seconds:g} --clock {options.clock}"
    return f"python benchmarks/deploy.py {said}"


if __name__ == "__main__":
    main()
