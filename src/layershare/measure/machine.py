"""The machine a latency belongs to, and its threads."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def machine(threads: int | None = None) -> str:
    """Processor, system and threads in one line; no host name, no user name."""
    return f"{_processor()}, {platform.system()} {platform.machine()}, {threads or usable_cores()} threads"


def usable_cores() -> int:
    """Cores this process may run on (a container may have fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def fixed_threads(threads: int | None = None) -> Iterator[int]:
    """Gives torch exactly ``threads`` threads (default: all usable cores) and puts the old number back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or usable_cores())
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")
