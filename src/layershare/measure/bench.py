"""Any set of model folders and ONNX exports side by side: size, memory, latency, throughput.  No data, no quality."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layershare.config import Config
from layershare.errors import ModelError, OptionError
from layershare.measure.latency import latency
from layershare.measure.machine import fixed_threads, machine
from layershare.measure.resident import resident_memory
from layershare.measure.size import bytes_on_disk
from layershare.measure.subject import Subject, is_export, open_subject
from layershare.result import Latency

EVEN = 0.03
"""Times that differ by less than this fraction count as equal."""


class Row(Config):
    """One model. ``latency`` is one pass at batch 1, ``batch`` one at the large batch, ``decode`` one generation of
    ``Bench.new`` tokens from a prompt, all in milliseconds a call; memory is None where it could not be measured."""

    label: str
    engine: str
    precision: str
    bytes_on_disk: int
    resident_bytes: int | None
    latency: Latency
    batch: Latency | None = None
    decode: Latency | None = None


class Bench(Config):
    """Figures of several models; the first is the measure. ``new`` tokens were generated where a model can."""

    machine: str
    threads: int
    tokens: int
    new: int
    rows: tuple[Row, ...]

    def table(self) -> str:
        """:meth:`cells` as Markdown."""
        head, *rows = self.cells()
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def cells(self) -> list[list[str]]:
        """Medians with the 95th percentile in brackets, and how many times as fast as the first model; head first."""
        head = ["", "engine", "MB on disk", "MB resident", "batch 1, ms", "times as fast"]
        large = next((row.batch.batch for row in self.rows if row.batch), None)
        head += [f"batch {large}, inputs/s"] if large else []
        head += ["decoding, tokens/s"] if any(row.decode for row in self.rows) else []
        return [head, *(self._cells(row, head) for row in self.rows)]

    def notes(self) -> list[str]:
        """What the figures say about sharing, in words: who is no faster than the first model of its engine."""
        said = []
        for number, row in enumerate(self.rows):
            peers = [
                one
                for one in self.rows[:number]
                if (one.engine, one.precision) == (row.engine, row.precision)
            ]
            if peers:
                gain = peers[0].latency.p50_ms / row.latency.p50_ms
                word = (
                    "faster than"
                    if gain > 1 + EVEN
                    else "slower than"
                    if gain < 1 - EVEN
                    else "no faster than"
                )
                times = f" ({gain:.2f} times as fast)"
                said.append(f"{row.label} is {word} {peers[0].label} at batch 1{times}.")
        return said

    def speedup(self, label: str) -> float:
        """How many times as fast as the first model ``label`` is at batch 1."""
        (row,) = (row for row in self.rows if row.label == label)
        return self.rows[0].latency.p50_ms / row.latency.p50_ms

    def _cells(self, row: Row, head: Sequence[str]) -> list[str]:
        memory = "" if row.resident_bytes is None else f"{row.resident_bytes / 1e6:,.1f}"
        cells = [
            row.label, f"{row.engine}, {row.precision}", f"{row.bytes_on_disk / 1e6:,.1f}", memory,
            f"{row.latency.p50_ms:.2f} ({row.latency.p95_ms:.2f})", f"{self.speedup(row.label):.2f}",
        ]  # fmt: skip
        if any(name.startswith("batch") and name.endswith("/s") for name in head):
            cells.append("" if row.batch is None else f"{1000 * row.batch.batch / row.batch.p50_ms:,.1f}")
        if head[-1].startswith("decoding"):
            cells.append("" if row.decode is None else f"{1000 * self.new / row.decode.p50_ms:,.1f}")
        return cells


def bench(
    folders: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    tokens: int = 12,
    new: int = 16,
    batch: int = 32,
    threads: int | None = None,
    runs: int = 50,
    seconds: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] = lambda _: None,
) -> Bench:
    """Measure model folders and exports on equal random inputs, in turns, in one process; memory in a child for each.

    Args:
        folders: folders, or label -> folder; the first is the measure.
        tokens: length of a text (of a prompt, where a model generates).
        new: tokens to generate.
        batch: the larger batch; 1 leaves it out.
        threads: compute threads (default: all usable cores).
        runs: timed runs of each model.
        seconds: cut the runs of one kind short after this long (at least 5 are made).
        clock: seconds; ``time.thread_time`` leaves out waiting for a busy machine, with one thread.

    Raises OptionError if a folder is named twice or reads fewer tokens, ModelError or StoreError for one that cannot be
    opened.
    """
    named = folders if isinstance(folders, Mapping) else {str(folder): folder for folder in folders}
    if len(named) < len(folders):
        raise OptionError("A folder is named twice.", "Name each one once.")
    for folder in named.values():
        if not is_export(folder) and not (Path(folder) / "config.json").is_file():
            raise ModelError(f"{folder} is neither a model folder nor an ONNX export.")
    with fixed_threads(threads) as used:
        subjects = {label: open_subject(folder, used) for label, folder in named.items()}
        for label, one in subjects.items():
            if (most := one.positions) is not None and tokens > most:
                raise OptionError(f"{label} reads at most {most} tokens, not {tokens}.", "Lower tokens.")
        settings: dict[str, Any] = {"runs": runs, "seconds": seconds, "clock": clock}
        progress("time batch 1")
        single = latency(_passes(subjects, 1, tokens), batch=1, tokens=tokens, **settings)
        many: dict[str, Latency] = {}
        if batch > 1:
            progress(f"time batch {batch}")
            many = latency(_passes(subjects, batch, tokens), batch=batch, tokens=tokens, settle=0, **settings)
        writers = {label: _generation(one, tokens, new) for label, one in subjects.items() if one.generate}
        if writers:
            progress("time decoding")
        written = latency(writers, batch=1, tokens=tokens, settle=0, **settings) if writers else {}
        rows = []
        for label, folder in named.items():
            progress(f"weigh {label}")
            rows.append(
                Row(
                    label=label,
                    engine=subjects[label].engine,
                    precision=subjects[label].precision,
                    bytes_on_disk=bytes_on_disk(folder),
                    resident_bytes=resident_memory(folder, threads=used),
                    latency=single[label],
                    batch=many.get(label),
                    decode=written.get(label),
                )
            )
        return Bench(machine=machine(used), threads=used, tokens=tokens, new=new, rows=tuple(rows))


def _passes(subjects: Mapping[str, Subject], batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    return {label: _pass(one, one.inputs(batch, tokens)) for label, one in subjects.items()}


def _pass(subject: Subject, inputs: Any) -> Callable[[], object]:
    return lambda: subject.run(inputs)


def _generation(subject: Subject, tokens: int, new: int) -> Callable[[], object]:
    inputs = subject.inputs(1, tokens)
    assert subject.generate is not None
    generate = subject.generate
    return lambda: generate(inputs, new)
