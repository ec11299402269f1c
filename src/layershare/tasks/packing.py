"""Packing: documents end to end, with a separator between, cut into blocks of one size. Nothing is padded.

As in GPT-2, RoBERTa (FULL-SENTENCES) and T5, a block may hold the end of one document and the beginning of the next,
and attention goes across, unless it is asked to stay apart (see :mod:`layershare.tasks.causal_lm`).
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from layershare.errors import ModelError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Frame:
    """What every block begins and ends with, and what stands behind every document."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    separator: int | None = None

    @property
    def size(self) -> int:
        return len(self.prefix) + len(self.suffix)


def separator_of(tokenizer: Any) -> int:
    """The token between documents. Raises ModelError if the tokenizer has none."""
    for name in ("eos_token_id", "sep_token_id", "bos_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return found
    raise ModelError(
        "The tokenizer has no token to put between documents.", "It needs an eos_token or a sep_token."
    )


def framed(tokenizer: Any) -> Frame:
    """Blocks that look like a single text to the model: for BERT [CLS] in front and [SEP] behind."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    start = next(starts, None)
    if not bare or start is None:
        return Frame(separator=separator_of(tokenizer))
    return Frame(tuple(whole[:start]), tuple(whole[start + len(bare) :]), separator_of(tokenizer))


def tokens_of(tokenizer: Any, texts: Iterable[str], separator: int, batch: int = 256) -> Iterator[list[int]]:
    """Token ids of each document, its separator behind it. Reads and holds ``batch`` documents at a time."""
    stream = iter(texts)
    while some := list(islice(stream, batch)):
        encoded = tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            yield [*ids, separator]


def pack(tokenizer: Any, texts: Iterable[str], frame: Frame, size: int) -> list[list[int]]:
    """All blocks of ``texts`` in memory, at most ``size`` tokens each; the last one may be shorter (but has two)."""
    assert frame.separator is not None
    flat = [token for ids in tokens_of(tokenizer, texts, frame.separator) for token in ids]
    body = size - frame.size
    cut = [flat[i : i + body] for i in range(0, len(flat), body)]
    return [[*frame.prefix, *block, *frame.suffix] for block in cut if len(block) > 1]


def packed_dataset(tokenizer: Any, dataset: "Dataset", frame: Frame, size: int) -> "Dataset":
    """:func:`pack` of a split, as rows to train on."""
    from datasets import Dataset

    blocks = pack(tokenizer, dataset["text"], frame, size)
    return Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]})


class Packed:
    """Blocks in a file, read where they are needed: rows for :func:`layershare.train.train`, all ``size`` long."""

    def __init__(self, path: Path, frame: Frame, size: int) -> None:
        self._tokens = np.load(path, mmap_mode="r")
        self._frame = frame
        self._body = size - frame.size
        self.tokens = len(self._tokens)

    def __len__(self) -> int:
        return self.tokens // self._body

    @overload
    def __getitem__(self, key: int) -> dict[str, list[int]]: ...
    @overload
    def __getitem__(self, key: str) -> "_Column": ...
    def __getitem__(self, key: int | str) -> "dict[str, list[int]] | _Column":
        return _Column(self) if isinstance(key, str) else {"input_ids": self.block(key)}

    def block(self, number: int) -> list[int]:
        """Token ids of one block; IndexError behind the last one."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        body = self._tokens[number * self._body : (number + 1) * self._body]
        return [*self._frame.prefix, *body.tolist(), *self._frame.suffix]


class _Column(Sequence[list[int]]):
    """``packed["input_ids"]``: a list of blocks that are read one at a time."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, key: Any) -> Any:
        return self if isinstance(key, slice) else self._packed.block(key)


def write_tokens(path: Path, stream: Iterable[list[int]], vocabulary: int, key: str) -> int:
    """Write all tokens of ``stream`` to ``path`` (.npy), unless it holds those of ``key`` already; returns how many.

    Holds little of it at a time. The file appears whole or not at all.
    """
    record = path.with_suffix(".json")
    if path.is_file() and record.is_file():
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            stored = {}
        if stored.get("key") == key:
            return stored["tokens"]
    kind = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    raw, part, count = path.with_suffix(".raw"), path.with_suffix(".part.npy"), 0
    with raw.open("wb") as file:
        for ids in stream:
            count += len(ids)
            np.asarray(ids, dtype=kind).tofile(file)
    with part.open("wb") as file, raw.open("rb") as tokens:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        while some := tokens.read(1 << 24):
            file.write(some)
    raw.unlink()
    record.unlink(missing_ok=True)
    os.replace(part, path)
    record.write_text(json.dumps({"key": key, "tokens": count}), encoding="utf-8")
    return count
