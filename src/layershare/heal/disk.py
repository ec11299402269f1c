"""Large arrays on disk: written whole or not at all, read without being loaded."""

import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layershare.errors import StoreError

Shape = tuple[int, ...]


def open_array(file: Path, shape: Shape, dtype: torch.dtype) -> Tensor | None:
    """A stored array, mapped into memory; None if the file is missing, cut off, or of another shape or type."""
    try:
        # "c": pages that are written to, which never happens, would be private.
        array = np.load(file, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    return torch.from_numpy(array) if array.shape == shape and array.dtype == _numpy(dtype) else None


def write_arrays(
    files: Mapping[Path, tuple[Shape, torch.dtype]], fill: Callable[[Sequence[Tensor]], None]
) -> list[Tensor]:
    """Make ``.npy`` files, all in one folder: ``fill`` gets the arrays and writes into them, then they get their names.

    Raises StoreError, before ``fill`` is called, when the disk has too little room or the folder cannot be written.
    """
    home = next(iter(files)).parent
    parts = {file: _part(file) for file in files}
    try:
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        needed = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in files.values())
        if needed > (free := shutil.disk_usage(home).free):
            raise StoreError(
                f"The teacher's outputs need {megabytes(needed)}, the disk of {home} has room for {megabytes(free)}.",
                "Make room, choose another folder, or set cache_precision to float16.",
            )
        arrays = {file: _create(parts[file], *files[file]) for file in files}
        fill([torch.from_numpy(array) for array in arrays.values()])
        for file, array in arrays.items():
            array.flush()
            os.replace(parts[file], file)
    except OSError as error:
        raise StoreError(
            f"The teacher's outputs cannot be kept in {home} ({error.strerror or error}).",
            "Choose another folder, or none, which keeps them in memory.",
        ) from error
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.unlink()
    return [torch.from_numpy(array) for array in arrays.values()]


def megabytes(size: float) -> str:
    """A size in words."""
    return f"{size / 1e6:,.1f} MB"


def _create(part: Path, shape: Shape, dtype: torch.dtype) -> np.memmap:
    array = np.lib.format.open_memmap(part, "w+", _numpy(dtype), shape)
    if hasattr(os, "posix_fallocate"):
        # Otherwise a disk that fills up while pages are written would end the process with SIGBUS.
        with part.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return array


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}.part")


def _sweep(home: Path) -> None:
    """Remove what a killed process of this machine left unfinished."""
    if os.name != "posix":
        return  # there os.kill would not only ask
    for part in home.glob(f"*.{socket.gethostname()}-*.part"):
        try:
            os.kill(int(part.stem.rpartition("-")[2]), 0)
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            continue


def _numpy(dtype: torch.dtype) -> np.dtype:
    return np.dtype({torch.float32: np.float32, torch.float16: np.float16, torch.int32: np.int32}[dtype])
