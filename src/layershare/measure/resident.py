"""Resident memory of a loaded model, PyTorch or ONNX, in a process of its own.

What is counted is what loading the folder and one run on a short text add to a process that has the libraries loaded,
and for ONNX an empty session open. Freed blocks that the allocator keeps are given back first.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

from layershare.measure.memory import STATUS, status_bytes
from layershare.measure.subject import is_export, open_subject
from layershare.onnx.session import give_back


def resident_memory(
    folder: str | os.PathLike, *, threads: int | None = None, timeout: float = 300.0
) -> int | None:
    """Bytes of resident memory that an open model takes; None where there is no /proc, or, with a warning, if the
    child failed.

    folder: a model folder or an ONNX export. threads: of the child. timeout: seconds.
    """
    if not STATUS.exists():
        return None
    command = [
        sys.executable,
        "-m",
        "layershare.measure.resident",
        str(Path(folder).absolute()),
        str(threads or 0),
    ]
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        warnings.warn(f"Memory of {folder} not measured: no answer in {timeout:.0f} s.", stacklevel=2)
        return None
    if child.returncode:
        why = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        warnings.warn(f"Memory of {folder} not measured: {why}", stacklevel=2)
        return None
    return int(json.loads(child.stdout.strip().splitlines()[-1])["resident_bytes"])


def _measure_here(folder: str, threads: int) -> int:
    if is_export(folder):
        empty = _empty_session()  # noqa: F841 - what an empty session takes is not the model's
    else:
        import torch
        import transformers

        with torch.device("meta"):
            transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
        torch.nn.Linear(64, 64)(torch.zeros(8, 64))
    give_back()
    before = status_bytes(STATUS.read_text(), "VmRSS")
    subject = open_subject(folder, threads or None)
    subject.run(subject.inputs(1, 12))
    give_back()
    return status_bytes(STATUS.read_text(), "VmRSS") - before


def _empty_session() -> object:
    import onnx
    import onnxruntime

    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "empty", info[:1], info[1:]
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    return onnxruntime.InferenceSession(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"resident_bytes": _measure_here(sys.argv[1], int(sys.argv[2]))}) + "\n")
