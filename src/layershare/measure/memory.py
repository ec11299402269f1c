"""Peak memory of a model, measured in a process of its own.

In the measuring process itself the number would be worthless: other models, the libraries and freed blocks
that the allocator keeps are all in it.  So a child imports everything, notes its resident memory, loads the
folder, runs one batch, and reports how far above that note its peak rose.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def peak_memory(
    folder: str | os.PathLike,
    auto_class: str,
    batch: Mapping[str, Any],
    *,
    threads: int | None = None,
    timeout: float = 300.0,
) -> int | None:
    """Bytes of resident memory that loading ``folder`` and running ``model(**batch)`` need at their peak.

    Counted above the interpreter and its libraries.  Weights stay mapped from their file and count once they
    are touched, so the rows of an embedding that the batch does not look up are not in it.

    Args:
        folder: a model folder, or an adapter folder.
        auto_class: name of the transformers class that loads it, such as ``AutoModel``.
        batch: tensors of shape [texts, tokens].
        threads: compute threads of the child (default: what it finds).
        timeout: seconds.

    Returns:
        None where there is no /proc (not Linux), or, with a warning that says why, when the child failed.
    """
    if not STATUS.exists():
        return None
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "batch.safetensors"
        save_file({name: tensor.contiguous().cpu() for name, tensor in batch.items()}, file)
        command = [
            sys.executable,
            "-m",
            "layershare.measure.memory",
            str(Path(folder).absolute()),
            auto_class,
            str(file),
        ]
        environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        try:
            child = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            warnings.warn(
                f"Peak memory of {folder} not measured: no answer in {timeout:.0f} s.", stacklevel=2
            )
            return None
    if child.returncode:
        why = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        warnings.warn(f"Peak memory of {folder} not measured: {why}", stacklevel=2)
        return None
    return int(json.loads(child.stdout.strip().splitlines()[-1])["peak_bytes"])


def status_bytes(text: str, key: str) -> int:
    """The value of ``key`` (``VmRSS``, ``VmHWM``) in the text of /proc/PID/status, in bytes."""
    line = next(line for line in text.splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def _measure_here(folder: str, auto_class: str, batch_file: str) -> int:
    """The child's work.  Everything that is not the model is done before the note is taken."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from layershare.measure.opening import base_of, open_measured
    from layershare.store.open import auto_class_of

    base = base_of(folder)
    if base is not None:
        import peft  # noqa: F401

    batch, config = load_file(batch_file), AutoConfig.from_pretrained(base or folder)
    with torch.device("meta"):  # imports the model's code without allocating its weights
        auto_class_of(config, auto_class).from_config(config)
    torch.nn.Linear(64, 64)(torch.zeros(8, 64))  # sets up threads and the matrix library

    before = status_bytes(STATUS.read_text(), "VmRSS")
    with contextlib.suppress(
        OSError
    ):  # where a container forbids it, the imports' peak stays in: an upper bound
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    model = open_measured(folder, auto_class)
    with torch.inference_mode():
        model(**batch)
    return status_bytes(STATUS.read_text(), "VmHWM") - before


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"peak_bytes": _measure_here(*sys.argv[1:4])}) + "\n")
