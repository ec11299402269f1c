"""Wall time of several models, measured fairly.  No torch.

On a shared machine the clock speed and the neighbours change within seconds.  Timing one model after the
other would charge that to whoever came second, so the runs take turns: A, B, A, B, ...  Each turn starts with
untimed runs that bring the model's weights back into the cache, as in a process that serves one model.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from layershare.result import Latency


def latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    batch: int,
    tokens: int | None = None,
    runs: int = 50,
    warmup: int = 3,
    settle: int = 1,
    seconds: float = 6.0,
    fewest: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Times every call ``runs`` times in turns and gives p50 and p95 in milliseconds per call (not per text).

    Args:
        calls: label -> one forward pass of that model on the same batch; it must wait for the device.
        batch, tokens: shape of the input, only recorded.
        runs: timed runs of each call.
        warmup: untimed rounds before the first timed one.
        settle: untimed runs at the start of each turn.
        seconds: once this much time has passed, stop after the current round ...
        fewest: ... but never before this many timed runs of each call.
        clock: seconds, monotonic.
    """
    taken: dict[str, list[float]] = {label: [] for label in calls}
    with no_garbage_collection():
        for _ in range(warmup):
            for call in calls.values():
                call()
        began = clock()
        for done in range(runs):
            if done >= fewest and clock() - began >= seconds:
                break
            for label, call in calls.items():
                for _ in range(settle):
                    call()
                start = clock()
                call()
                taken[label].append(1000 * (clock() - start))
    return {
        label: Latency(
            batch=batch,
            tokens=tokens,
            runs=len(times),
            p50_ms=quantile(times, 0.5),
            p95_ms=quantile(times, 0.95),
        )
        for label, times in taken.items()
    }


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile (0 to 1) by linear interpolation between the two nearest ranks, as numpy does."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collects once, then keeps the collector off; leaves it as it was found."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
