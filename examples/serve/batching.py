"""Dynamic batching: requests that wait at the same time are computed together.  asyncio and nothing else.

One thread computes, so the compute threads of ONNX Runtime are not fought over. While it computes, requests gather;
when it is free, the oldest one and all of its kind that wait go next, at most ``most`` texts. Where nobody waits, a
request may be held back for ``wait`` seconds so that others can join it; 0, the default, never holds one back.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

Compute = Callable[[Hashable, list[str]], Sequence[Any]]
"""(kind, texts) -> one answer a text."""


class FullError(Exception):
    """As many texts wait as may."""


class ClosedError(Exception):
    """The service is stopping."""


@dataclass(eq=False)
class _Waiting:
    kind: Hashable
    texts: list[str]
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """``await submit(kind, texts)``; kinds are never mixed in a batch.

    Attributes:
        batches, texts: how many were computed so far.
    """

    def __init__(self, compute: Compute, *, most: int, waiting: int, wait: float = 0.0) -> None:
        """``most``: texts of a batch. ``waiting``: texts that may wait. ``wait``: seconds."""
        self.compute, self.most, self.limit, self.wait = compute, most, waiting, wait
        self.batches = self.texts = 0
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "compute")
        self._task = asyncio.create_task(self._work())

    @property
    def waiting(self) -> int:
        """Texts that wait."""
        return sum(len(one.texts) for one in self._queue)

    async def submit(self, kind: Hashable, texts: list[str]) -> list[Any]:
        """One answer a text. Raises FullError or ClosedError, and what computing raises."""
        if self._closing:
            raise ClosedError
        if self._queue and self.waiting + len(texts) > self.limit:
            raise FullError
        one = _Waiting(kind, texts)
        self._queue.append(one)
        self._arrived.set()
        try:
            return await one.answer
        finally:
            if one in self._queue:  # who asked has gone away
                self._queue.remove(one)

    async def close(self) -> None:
        """Take nothing new, answer all that wait, stop."""
        self._closing = True
        self._arrived.set()
        await self._task
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            if self.wait and not self._closing and self.waiting < self.most:
                await asyncio.sleep(self.wait)
            batch = self._next()
            if not batch:
                continue
            texts = [text for one in batch for text in one.texts]
            try:
                found = await loop.run_in_executor(self._thread, self.compute, batch[0].kind, texts)
            except Exception as error:  # goes to who asked
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            self.batches, self.texts = self.batches + 1, self.texts + len(texts)
            answers = iter(found)
            for one in batch:
                own = [next(answers) for _ in one.texts]
                if not one.answer.done():
                    one.answer.set_result(own)

    def _next(self) -> list[_Waiting]:
        """The oldest request and others of its kind, at least one, taken off the queue."""
        taken: list[_Waiting] = []
        size = 0
        for one in list(self._queue):
            if not taken or (one.kind == taken[0].kind and size + len(one.texts) <= self.most):
                taken.append(one)
                size += len(one.texts)
                self._queue.remove(one)
        return taken
