"""An onnxruntime session that keeps each weight in memory once."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from layershare.errors import DependencyError, StoreError

SLOW = ["SkipLayerNormFusion"]
"""Optimisers of ONNX Runtime that are left out: on the CPU its fused operator takes longer than its parts."""

# onnxruntime 1.32 keeps an id of the machine and reports its use, unless told otherwise before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def open_session(file: Path, threads: int | None = None) -> Any:
    """The session of a graph, on the CPU. Raises DependencyError without onnxruntime, StoreError if it cannot be read.

    ONNX Runtime packs each constant matrix for its kernels when it loads a graph. Equal packed matrices it keeps once,
    and it frees the unpacked ones; what it freed has to be given back to the system, or it stays resident.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            "exported models run on onnxruntime.", "pip install layershare[onnx]"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW
        )
    except Exception as error:  # onnxruntime's errors have no common base
        raise StoreError(f"{file} cannot be run: {str(error).splitlines()[0]}") from error
    give_back()
    return session


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
