"""All figures of several models, measured in one process, on the same texts, in turns."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layershare.errors import DataError
from layershare.measure.cost import flops
from layershare.measure.latency import latency
from layershare.measure.machine import fixed_threads
from layershare.measure.memory import peak_memory
from layershare.measure.opening import base_of, bytes_with_base, open_measured, sparsity_of
from layershare.result import Figures, Latency
from layershare.tasks.calibration import encode_inputs
from layershare.tasks.encoding import lengths, rows_at

if TYPE_CHECKING:
    from layershare.tasks import Data, Task


def compare(
    models: Mapping[str, str | Path],
    task: "Task",
    data: "Data",
    *,
    batches: Sequence[int] = (1, 32),
    runs: int = 50,
    seconds: float = 6.0,
    threads: int | None = None,
    max_length: int | None = None,
    memory: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Figures]:
    """Measures quality, parameters, bytes, sparsity, memory, FLOPs and latency of model folders, on the CPU.

    Speed is measured on texts of median length: typical of the data, and they need little padding.

    Args:
        models: label -> folder of a model or an adapter; the first is the original, to which the others are compared.
        task: how to load and judge them.
        data: what ``task.read`` gave; judged on ``data.test``, or else ``data.validation``.
        batches: batch sizes to time; FLOPs are per text of the largest one, memory is for one pass of it.
        runs: timed runs per model and batch size.
        seconds: cut the runs of one batch size short after this long (at least 5 are made).
        threads: compute threads (default: every usable core).
        max_length: longer texts are cut to this many tokens (default: what the model takes, up to 512).
        memory: measure peak memory, in a child process per model.
        progress: told in a few words what comes next.

    Returns:
        One ``Figures`` per model, in the order given.

    Raises:
        DataError: there is no held-out data.
        ModelError, StoreError: a folder cannot be loaded.
    """
    from layershare.sharing import count
    from layershare.store.open import load_processor

    dataset = held_out(data)
    with fixed_threads(threads) as used:
        loaded = {label: open_measured(folder, task.auto_class) for label, folder in models.items()}
        original = next(iter(loaded))
        needs_teacher = task.metric_of(dataset) == "agreement"
        metrics: dict[str, dict[str, float]] = {}
        for label, folder in models.items():
            progress(f"judge {label}")
            teacher = loaded[original] if needs_teacher else None
            metrics[label] = task.evaluate(
                loaded[label],
                load_processor(base_of(folder) or folder, task.processor),
                dataset,
                max_length=max_length,
                teacher=teacher,
            )

        processor = load_processor(base_of(models[original]) or models[original], task.processor)
        some = dataset.select(range(min(len(dataset), 1000)))
        encoded = encode_inputs(task, processor, some, max_length or 512, loaded[original].config)
        rows = rows_at(encoded, typical(lengths(task.counts(encoded), encoded), max(batches)))
        inputs = {size: _inputs(task, task.collate(processor, rows[:size])) for size in batches}
        speeds: dict[str, list[Latency]] = {label: [] for label in models}
        for size, batch in inputs.items():
            progress(f"time batch {size}")
            calls = {label: _forward(model, batch) for label, model in loaded.items()}
            tokens = _tokens(next(iter(batch.values())))
            for label, speed in latency(calls, batch=size, tokens=tokens, runs=runs, seconds=seconds).items():
                speeds[label].append(speed)

        figures = []
        batch = inputs[max(batches)]
        for label, folder in models.items():
            progress(f"weigh {label}")
            counts = count(loaded[label])
            figures.append(
                Figures(
                    label=label,
                    metrics=metrics[label],
                    parameters_unique=counts.unique,
                    parameters_effective=counts.effective,
                    layer_parameters_unique=counts.layer_unique,
                    layer_parameters_effective=counts.layer_effective,
                    bytes_on_disk=bytes_with_base(folder),
                    peak_memory_bytes=peak_memory(folder, task.auto_class, batch, threads=used)
                    if memory
                    else None,
                    flops_per_text=round(flops(loaded[label], batch) / max(batches)),
                    sparsity=sparsity_of(loaded[label]) if base_of(folder) is None else None,
                    latency=speeds[label],
                )
            )
    return figures


def held_out(data: "Data") -> Any:
    """The test split, or else the validation split.  Raises DataError when there is neither."""
    for split in (data.test, data.validation):
        if split is not None and len(split):
            return split
    raise DataError("There is no held-out data to measure quality on.", "Give a test file.")


def typical(lengths: Sequence[int], size: int) -> list[int]:
    """``size`` row numbers, those nearest the median length first, so that every beginning is typical.

    When there are fewer than ``size`` they are repeated.
    """
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    middle = len(by_length) // 2
    nearest = sorted(range(len(by_length)), key=lambda place: (abs(place - middle), place))
    return [by_length[nearest[number % len(nearest)]] for number in range(size)]


def _tokens(main: Any) -> int | None:
    """The tokens of each input; None where it is none, but pixels or samples."""
    return main.shape[1] if main.ndim == 2 and not main.is_floating_point() else None


def _inputs(task: "Task", batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in task.inputs if name in batch}


def _forward(model: Any, batch: Mapping[str, Any]) -> Callable[[], None]:
    import torch

    def call() -> None:
        with torch.inference_mode():
            model(**batch)

    return call
