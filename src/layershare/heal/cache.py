"""What the teacher says of every training text, computed once and kept: in memory, or in a folder for other runs too.

On disk each kind of output is one ``.npy`` file, mapped into memory when read, in a folder named after the teacher's
weights and config, the token ids and the task; so another student, seed, loss or layer map finds what is there and
computes only what is missing, and another teacher or text finds nothing. A file appears whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layershare.errors import OptionError
from layershare.heal.checkpoints import digest_rows
from layershare.heal.disk import megabytes, open_array, write_arrays
from layershare.heal.losses import TopLogits
from layershare.heal.teacher import Ask, Target, Wanted, live
from layershare.tasks import Task
from layershare.tasks.encoding import batches, rows_at
from layershare.tasks.task import Axis

FORMAT = 1
VALUES = ("values", "value_weights")
SAMPLE = 8
"""So many rows of a stored file are computed again, to see that it still holds what this teacher says."""


@dataclass(frozen=True)
class Stream:
    """One kind of output: the shape of an entry, the axis that has one for each token (None: one a row), and its type
    when kept."""

    shape: tuple[int, ...]
    axis: Axis | None
    dtype: torch.dtype

    def size(self, entries: int) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize * entries


class TeacherOutputs:
    """The outputs of a teacher for rows of inputs, not computed yet: how large they are, then a way to recall them.

    Args:
        dataset: inputs, one row a text, as ``task.encode`` gives them.
        rows: the rows that will be asked for (default: all); asking for another one is an IndexError.
        device: where the teacher runs (default: where it is).
        half: keep floating point numbers in float16, which halves the size and rounds to about 3 digits.
    """

    def __init__(
        self,
        teacher: nn.Module,
        task: Task,
        tokenizer: Any,
        dataset: Any,
        wanted: Wanted = Wanted(),  # noqa: B008 - frozen
        *,
        rows: Sequence[int] | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        half: bool = False,
    ) -> None:
        self._teacher, self._task, self._wanted, self._tokenizer = teacher, task, wanted, tokenizer
        self._device = torch.device(device) if device is not None else next(teacher.parameters()).device
        self._batch_size, self._half = batch_size, half
        self._rows = list(range(len(dataset))) if rows is None else sorted(set(rows))
        asked = [name for name in dataset.column_names if name != "labels" or name in task.inputs]
        self._encoded = dataset.select_columns(asked).select(self._rows)
        counts = task.counts(self._encoded, teacher.config)
        lengths = {axis: torch.tensor(each) for axis, each in counts.items()}
        none = torch.zeros(1, dtype=torch.long)
        self._starts = {axis: torch.cat([none, each.cumsum(0)]) for axis, each in lengths.items()}
        self._place = torch.full((len(dataset),), -1)
        self._place[torch.tensor(self._rows)] = torch.arange(len(self._rows))
        self.streams = {
            name: self._stream(value) for name, value in self._say([0], live(teacher, task, wanted))
        }

    @property
    def size(self) -> int:
        """Bytes of all that is kept."""
        return sum(stream.size(self._entries(stream.axis)) for stream in self.streams.values())

    def describe(self, names: Iterable[str] = ()) -> str:
        """In words, for the user: the size of each kind of output, or of those with these ``names``."""
        chosen = {name: self.streams[name] for name in names or self.streams}
        sizes = {name: stream.size(self._entries(stream.axis)) for name, stream in chosen.items()}
        each = ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items())
        tokens = sum(self._entries(axis) for axis in self._starts)
        what = f"{len(self._rows):,} {self._task.unit}s" + (f" of {tokens:,} tokens" if tokens else "")
        return f"{megabytes(sum(sizes.values()))} for {what} ({each})"

    def in_memory(self) -> Ask:
        """Run the teacher once over the texts and keep what it says. Equal to :func:`~.teacher.live` up to rounding: a
        text is computed beside others than in training, so the padding differs."""
        arrays = {
            name: torch.empty(self._shape(name), dtype=stream.dtype) for name, stream in self.streams.items()
        }
        self._fill(arrays)
        return self._recall(arrays)

    def on_disk(self, folder: str | Path, say: Callable[[str], None] = lambda _: None) -> Ask:
        """As :meth:`in_memory`, kept below ``folder`` and read from there when it is found again.

        A file that is cut off, or does not hold what the teacher says of some sample rows, is computed anew. Raises
        StoreError when the folder cannot be written or the disk has too little room, before the teacher runs.
        """
        home = Path(folder).expanduser() / f"{self._task.name}-{self.key()}"
        sample = self._sample()
        arrays = {}
        for name in self.streams:
            found = open_array(self._file(home, name), self._shape(name), self.streams[name].dtype)
            if found is not None:
                if self._holds(found, name, sample):
                    arrays[name] = found
                else:
                    say(
                        f"teacher: {self._file(home, name)} does not hold what the teacher says; computed anew"
                    )
        missing = [name for name in self.streams if name not in arrays]
        if missing:
            say(f"teacher: writing to {home}: {self.describe(missing)}")
            files = {
                self._file(home, name): (self._shape(name), self.streams[name].dtype) for name in missing
            }
            made = write_arrays(files, lambda new: self._fill(dict(zip(missing, new, strict=True))))
            arrays |= dict(zip(missing, made, strict=True))
        else:
            say(f"teacher: outputs read from {home}: {self.describe()}")
        return self._recall(arrays)

    def key(self) -> str:
        """A hash of everything that decides what the teacher says of the texts."""
        digest = hashlib.sha256(json.dumps([FORMAT, self._task.name]).encode())
        digest.update(model_hash(self._teacher).encode())
        digest.update(digest_rows(self._encoded, ()).encode())
        return digest.hexdigest()[:16]

    def _entries(self, axis: Axis | None) -> int:
        return len(self._rows) if axis is None else int(self._starts[axis][-1])

    def _shape(self, name: str) -> tuple[int, ...]:
        stream = self.streams[name]
        return (self._entries(stream.axis), *stream.shape)

    def _stream(self, found: tuple[Tensor, Axis | None]) -> Stream:
        value, axis = found
        kept = torch.float16 if self._half else torch.float32
        return Stream(tuple(value.shape[1:]), axis, kept if value.is_floating_point() else torch.int32)

    def _say(self, where: Sequence[int], ask: Ask) -> list[tuple[str, tuple[Tensor, Axis | None]]]:
        """What the teacher says of some texts (numbers among the rows kept), as named streams, in one batch."""
        batch = self._task.collate(self._tokenizer, rows_at(self._encoded, where))
        return list(self._ask(batch, where, ask).items())

    def _ask(
        self, batch: Mapping[str, Tensor], where: Sequence[int], ask: Ask
    ) -> dict[str, tuple[Tensor, Axis | None]]:
        inputs = {name: batch[name].to(self._device) for name in self._task.inputs if name in batch}
        at = torch.tensor(where)
        masks = {axis: self._mask(axis, at).to(self._device) for axis in self._starts}
        return _flat(ask(inputs, at), masks, self._wanted)

    def _mask(self, axis: Axis, at: Tensor) -> Tensor:
        """[B, T], where there are real tokens in a batch of these rows."""
        lengths = self._starts[axis][at + 1] - self._starts[axis][at]
        return torch.arange(int(lengths.max())) < lengths[:, None]

    def _fill(self, arrays: Mapping[str, Tensor]) -> None:
        ask = live(self._teacher, self._task, self._wanted)
        task, size = self._task, self._batch_size
        for where, batch in batches(self._tokenizer, self._encoded, size, task.collate, task.counts):
            slots = self._slots(torch.tensor(where))
            for name, (value, axis) in self._ask(batch, where, ask).items():
                if name not in arrays:
                    continue
                kept = value.to("cpu", arrays[name].dtype)
                if self._half and bool(kept.isinf().any()) and not bool(value.isinf().any()):
                    raise OptionError(
                        f"The teacher's outputs ({name}) are too large for float16.",
                        "Set cache_precision to float32.",
                    )
                arrays[name][slots[axis]] = kept

    def _slots(self, at: Tensor) -> dict[Axis | None, Tensor]:
        """Axis -> where the entries of some rows are kept."""
        found: dict[Axis | None, Tensor] = {None: at}
        for axis, starts in self._starts.items():
            found[axis] = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in at])
        return found

    def _recall(self, arrays: Mapping[str, Tensor]) -> Ask:
        def recall(inputs: Mapping[str, Tensor], rows: Tensor) -> Target:
            at = self._place[rows.cpu()]
            if bool((at < 0).any()):
                raise IndexError(f"No target was computed for rows {rows[at < 0].tolist()}.")
            device = next(iter(inputs.values())).device
            slots = self._slots(at)
            values = {}
            for name, array in arrays.items():
                axis = self.streams[name].axis
                value = array[slots[axis]].to(device)
                value = value.float() if value.is_floating_point() else value.long()
                if axis is not None:
                    mask = self._mask(axis, at).to(device)
                    padded = value.new_zeros(*mask.shape, *value.shape[1:])
                    padded[mask] = value
                    value = padded
                values[name] = value
            return _target(values, self._wanted)

        return recall

    # ---- on disk

    def _file(self, home: Path, name: str) -> Path:
        return home / f"{name}{'.float16' if self._half else ''}.npy"

    def _sample(self) -> dict[str, tuple[list[int], Tensor]]:
        """Name -> (places, what the teacher says there), for rows spread over all."""
        step = max(1, len(self._rows) // SAMPLE)
        where = list(range(0, len(self._rows), step))[:SAMPLE]
        at = {axis: slots.tolist() for axis, slots in self._slots(torch.tensor(where)).items()}
        said = self._say(where, live(self._teacher, self._task, self._wanted))
        return {name: (at[axis], value.cpu()) for name, (value, axis) in said}

    def _holds(self, array: Tensor, name: str, sample: Mapping[str, tuple[list[int], Tensor]]) -> bool:
        places, said = sample[name]
        if not said.is_floating_point():
            return True  # which of two equal logits comes first is left to chance
        finite = said.isfinite()
        size = float(said[finite].abs().max()) if bool(finite.any()) else 0.0
        kept = array[places].float()
        return torch.allclose(
            kept, said.float(), rtol=0, atol=(2e-3 if self._half else 1e-4) * max(size, 1e-3)
        )


def model_hash(model: nn.Module) -> str:
    """A hash of a model's weights and of what its config says about computing with them."""
    config: Any = model.config
    told = json.loads(config.to_json_string(use_diff=True))
    for name in ("_name_or_path", "transformers_version", "architectures", "use_cache"):
        told.pop(name, None)
    digest = hashlib.sha256(json.dumps([type(model).__name__, told], sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _flat(
    target: Target, masks: Mapping[Axis, Tensor], wanted: Wanted
) -> dict[str, tuple[Tensor, Axis | None]]:
    """Name -> (entries, the axis they lie along), end to end without padding."""

    def entries(value: Tensor, axis: Axis | None) -> tuple[Tensor, Axis | None]:
        return (value, None) if axis is None or axis not in masks else (value[masks[axis]], axis)

    found: dict[str, tuple[Tensor, Axis | None]] = {}
    if target.embedding is not None:
        found["embedding"] = target.embedding, None
    if isinstance(target.logits, TopLogits):
        for part, value in target.logits._asdict().items():
            found[f"top-{wanted.top}-{wanted.temperature:g}-{part}"] = entries(value, target.along["logits"])
    elif target.logits is not None:
        found["logits"] = entries(target.logits, target.along["logits"])
    for name in VALUES:
        if (value := getattr(target, name)) is not None:
            found[name] = value, None
    for layer, value in target.hidden.items():
        found[f"hidden-{layer}"] = entries(value, target.along[f"hidden-{layer}"])
    for name, value in target.relations.items():
        found[f"{name}-{wanted.relations}"] = entries(value, target.along["relations"])
    return found


def _target(values: Mapping[str, Tensor], wanted: Wanted) -> Target:
    """The inverse of :func:`_flat`, padded again."""
    top = f"top-{wanted.top}-{wanted.temperature:g}"
    logits: Tensor | TopLogits | None = values.get("logits")
    if f"{top}-rest" in values:
        logits = TopLogits(*(values[f"{top}-{part}"] for part in TopLogits._fields))
    relations = {name: f"{name}-{wanted.relations}" for name in ("q", "k", "v")}
    return Target(
        values.get("embedding"),
        logits,
        {layer: values[f"hidden-{layer}"] for layer in wanted.hidden},
        {name: values[key] for name, key in relations.items() if key in values},
        values=values.get("values"),
        value_weights=values.get("value_weights"),
    )
