"""The same model as ONNX by other tools: what each stores, what it quantises, how fast it is.

    python benchmarks/peers.py [--optimum VENV/bin/python] [--work FOLDER] [--docs docs/benchmarks.md]

The models of benchmarks/deploy.py. Straight: ``torch.onnx.export`` and onnxruntime's ``quantize_dynamic``, as their
pages say. optimum-onnx, which does not install beside transformers 5, runs in an environment of its own
(``pip install torch==2.13.0 optimum-onnx onnxruntime``) on the same weights, tied there as well; its graph is
quantised by the same function. All graphs of a model are timed in turns, by processor time, with one thread.
"""

import argparse
import contextlib
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from deploy import DEPTH, TOKENS, exported, model
from page import write

from layershare.export import export
from layershare.measure.latency import latency
from layershare.onnx.session import open_session
from layershare.store.open import load_model

TITLE = "## The same model by other exporters"
PAST = 20
QUANTISED = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
PRODUCTS = (*QUANTISED, "MatMul", "Gemm")
HEAD = ["", "float32, MB", "times the unique bytes", "int8, MB", "int8 of float32", "products in int8",
        "float32, ms", "int8, ms"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimum", type=Path, help="the Python of an environment with optimum-onnx")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--docs", type=Path, help="write the result to this section of a page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parts = [
            section(kind, unique, work, options) for kind in ("encoder", "decoder") for unique in (DEPTH, 3)
        ]
    lines = [line for part in parts for line in part]
    page = "\n".join([TITLE, "", *about(options), "", *lines, f"    {command(options)}", ""])
    print(page)
    if options.docs:
        write(options.docs, page)


def section(kind: str, unique: int, work: Path, options: argparse.Namespace) -> list[str]:
    """The table of one model."""
    folder = model(kind, options.width, unique, work)
    weights = sum(p.nbytes for p in load_model(folder).parameters())
    graphs = {"layershare": [exported(folder, int8=False), exported(folder, int8=True)]}
    straight = once(work / f"{folder.name}-straight", lambda out: export_straight(folder, out))
    graphs["straight"] = [straight, quantised(straight)]
    if options.optimum:
        made = once(
            work / f"{folder.name}-optimum", lambda out: export_optimum(kind, folder, out, options.optimum)
        )
        graphs["optimum-onnx"] = [made, quantised(made)]
    calls = {
        f"{name} {i}": call(one / "model.onnx") for name, both in graphs.items() for i, one in enumerate(both)
    }
    times = latency(calls, batch=1, runs=400, seconds=options.seconds, clock=time.thread_time)
    _, every = quantised_products(
        graphs["layershare"][1] / "model.onnx"
    )  # others hide weights behind more nodes
    rows = []
    for name, both in graphs.items():
        full, small = (size(one) for one in both)
        done, _ = quantised_products(both[1] / "model.onnx")
        ms = [f"{times[f'{name} {i}'].p50_ms:.2f}" for i in (0, 1)]
        rows.append([name, f"{full / 1e6:,.1f}", f"{full / weights:.2f}", f"{small / 1e6:,.1f}",
                     f"{small / full:.2f}", f"{done} of {every}", *ms])  # fmt: skip
    table = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *rows]
    what = "dense" if unique == DEPTH else f"{unique} unique layers"
    return [f"### {kind.capitalize()}, width {options.width}, {what}", "",
            *(f"| {' | '.join(row)} |" for row in table), ""]  # fmt: skip


def once(out: Path, make: Callable[[Path], None]) -> Path:
    if not out.exists():
        print(f"export {out.name}", flush=True)
        make(out)
    return out


def export_straight(folder: Path, out: Path) -> None:
    """As torch's pages say."""
    made = load_model(folder)
    ids = torch.arange(2 * 5).reshape(2, 5)
    example: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    out.mkdir()
    torch.onnx.export(
        Plain(made), kwargs=example, f=out / "model.onnx", dynamic_shapes=axes, dynamo=True, verbose=False
    )  # fmt: skip


class Plain(torch.nn.Module):
    """The model with one output, and no cache."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]


def export_optimum(kind: str, folder: Path, out: Path, python: Path) -> None:
    dense = folder
    if load_model(folder).config.to_dict().get("quantization_config"):
        dense = once(folder.with_name(f"{folder.name}-dense"), lambda to: export(folder, to) and None)
    task = "feature-extraction" if kind == "encoder" else "text-generation-with-past"
    script = Path(__file__).with_name("optimum_export.py")
    done = subprocess.run([python, script, dense, out, task], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"optimum-onnx failed: {done.stderr.strip().splitlines()[-1]}")


def quantised(folder: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    def make(out: Path) -> None:
        out.mkdir()
        quantize_dynamic(folder / "model.onnx", out / "model.onnx")

    return once(folder.with_name(f"{folder.name}-int8"), make)


def quantised_products(file: Path) -> tuple[int, int]:
    """Products in int8, and all of a constant with something, as far as the graph shows it."""
    graph = onnx.load(file, load_external_data=False).graph
    constants = {one.name for one in graph.initializer}
    fixed = constants | {
        n.output[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in constants
    }
    kinds = Counter(n.op_type for n in graph.node if n.op_type in PRODUCTS and fixed & set(n.input[:2]))
    return sum(kinds[one] for one in QUANTISED), kinds.total()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if ".onnx" in file.name)


def call(file: Path) -> Callable[[], object]:
    """One pass of a graph on a text, or of a decoder with a cache on one more token."""
    session = open_session(file, 1)
    known = {one.name: one for one in session.get_inputs()}
    new = 1 if any(name.startswith("past") for name in known) else TOKENS
    ids = np.random.default_rng(0).integers(4000, 8000, (1, new))
    past = PAST if new == 1 else 0
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, new + past), np.int64),
             "token_type_ids": np.zeros_like(ids), "position_ids": np.full((1, new), past)}  # fmt: skip
    for name, one in known.items():
        if name.startswith("past"):
            feeds[name] = np.zeros((1, one.shape[1], past, one.shape[3]), np.float32)
    fed = {name: array for name, array in feeds.items() if name in known}
    return lambda: session.run(None, fed)


def about(options: argparse.Namespace) -> list[str]:
    return [
        f"Models of {DEPTH} layers, width {options.width}, random weights. Encoders get a text of {TOKENS} tokens,",
        f"decoders one more token behind {PAST}; straight exports of decoders have no cache and get {TOKENS} tokens.",
        "Medians, processor time, one thread, in turns."
        + ("" if options.optimum else " optimum-onnx was not run."),
    ]


def command(options: argparse.Namespace) -> str:
    optimum = " --optimum VENV/bin/python" * bool(options.optimum)
    return f"python benchmarks/peers.py --width {options.width}{optimum} --seconds {options.seconds:g}"


if __name__ == "__main__":
    main()
