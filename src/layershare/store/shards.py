"""Safetensors files written tensor by tensor: all places are set aside first, so nothing is held and nothing moved."""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from layershare.errors import StoreError
from layershare.store.disk import DiskFile, room

SHARD_SIZE = "5GB"
# By alignment: in a file the tensors of the last kind come first. The order is that of the safetensors library, so
# that the files are the same as those of ``save_pretrained``, byte for byte.
KINDS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


class Shards:
    """A checkpoint to be filled: ``with Shards(folder, tensors) as out: out.put(name, tensor)``, in any order.

    ``tensors``: names, shapes and precisions of all that will come, on the meta device; ``parameters``: their number,
    for the index. The files are those that ``save_pretrained`` would write.
    Raises StoreError if the disk is too small or cannot be written, and at the end of the block if a tensor did not
    come.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Tensor], parameters: int, max_shard_size: int | str = SHARD_SIZE
    ) -> None:  # fmt: skip
        if unknown := [name for name, tensor in tensors.items() if tensor.dtype not in KINDS]:
            raise StoreError(
                f"{unknown[0]} is of a kind that is not written here: {tensors[unknown[0]].dtype}."
            )
        need = sum(tensor.nbytes for tensor in tensors.values())
        if need > (free := shutil.disk_usage(folder).free):
            raise StoreError(
                f"{folder.parent} has {free / 1e9:,.1f} GB free, the model takes {need / 1e9:,.1f} GB.",
                "Choose another disk.",
            )
        pattern = SAFE_WEIGHTS_NAME.replace(".", "{suffix}.")
        split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size
        )
        self.expected = dict(tensors)
        self.places: dict[str, tuple[DiskFile, int]] = {}
        self.room = room()
        self.writer, self.writing = ThreadPoolExecutor(1), cast(Future[None] | None, None)
        for name, inside in split.filename_to_tensors.items():
            self._set_aside(folder / name, {key: tensors[key] for key in inside})
        if split.is_sharded:
            index = {
                "metadata": {"total_parameters": parameters, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            with _to_disk(folder / SAFE_WEIGHTS_INDEX_NAME):
                (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")

    def _set_aside(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        kinds = list(KINDS)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name in sorted(tensors, key=lambda name: (-kinds.index(tensors[name].dtype), name)):
            starts[name], end = end, end + tensors[name].nbytes
            header[name] = {
                "dtype": KINDS[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with _to_disk(path):
            file = DiskFile(path, len(text).to_bytes(8, "little") + text, 8 + len(text) + end, self.room)
        self.places |= {name: (file, 8 + len(text) + start) for name, start in starts.items()}

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor in its place. It must have the shape and precision that were announced, and come once.

        The writing goes on while the next tensor is made.
        """
        announced = self.expected.pop(name)
        assert (announced.shape, announced.dtype) == (tensor.shape, tensor.dtype), name
        self._wait()
        self.writing = self.writer.submit(_write, *self.places[name], tensor.detach())

    def _wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._wait()
        finally:
            self.writer.shutdown()
            for file in {id(file): file for file, _ in self.places.values()}.values():
                with _to_disk(file.name):
                    file.close()
        if error is None and self.expected:
            raise StoreError(
                f"{next(iter(self.expected))} and {len(self.expected) - 1} more tensors never came."
            )


def _write(file: DiskFile, start: int, tensor: Tensor) -> None:
    with _to_disk(file.name):
        file.write(start, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@contextmanager
def _to_disk(file: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{file}: cannot be written ({error.strerror or error}).") from error
