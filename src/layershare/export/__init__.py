"""A shared model for other tools: one format, one function."""

from collections.abc import Callable
from pathlib import Path

from layershare.errors import OptionError, nearest
from layershare.export.dense import Exported, to_dense
from layershare.export.onnx import OnnxExport, to_onnx

FORMATS: dict[str, Callable[..., Exported | OnnxExport]] = {
    "dense": to_dense,
    "onnx": to_onnx,
}

__all__ = ["FORMATS", "Exported", "OnnxExport", "export"]


def export(
    folder: str | Path, out: str | Path, form: str = "dense", *, int8: bool = False
) -> Exported | OnnxExport:
    """Write the model in ``folder`` as ``out``, a folder in the format ``form`` (a key of ``FORMATS``).

    ``int8``: quantise it, which ``onnx`` can.
    Raises OptionError naming the nearest format, what loading raises, and StoreError if there is something in ``out``.
    """
    if form not in FORMATS:
        raise OptionError(f"unknown format {form!r}.", nearest(form, FORMATS))
    if int8 and form != "onnx":
        raise OptionError(f"--int8 does not go with the format {form}.", "It goes with --format onnx.")
    return FORMATS[form](Path(folder), Path(out), **({"int8": True} if int8 else {}))
