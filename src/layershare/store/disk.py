"""A file of known size, written in pieces in any order and, where the disk allows it, past the page cache.

What is written once and not read again needs no copy of it in memory: making room for one costs more than the writing.
"""

import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE = 2**12  # direct writes begin and end at its multiples, in the file as in memory
ROOM = 2**23
Bytes = NDArray[np.uint8]


def room() -> Bytes:
    """Memory to write from, for any number of files, one at a time. It begins at a page."""
    return np.frombuffer(mmap.mmap(-1, ROOM), np.uint8)


class DiskFile:
    """``DiskFile(path, head, size, room())``: a new file of ``size`` bytes that begins with ``head``.

    Raises OSError, as ``write`` does.
    """

    def __init__(self, path: Path, head: bytes, size: int, room: Bytes) -> None:
        self.name, self.room = str(path), room
        self.cached = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.direct = -1
        try:
            self._through_cache(0, np.frombuffer(head, np.uint8))
            os.truncate(self.cached, size)
        except OSError:
            self.close()
            raise
        with suppress(AttributeError, OSError):  # some systems and some disks have no direct writing
            self.direct = os.open(path, os.O_WRONLY | os.O_DIRECT)

    def write(self, start: int, data: Bytes) -> None:
        """Put ``data`` at ``start``: whole pages directly, what is left at both ends through the cache."""
        end = start + len(data)
        first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if self.direct < 0 or first >= last:
            first = last = end
        self._through_cache(start, data[: first - start])
        for at in range(first, last, ROOM):
            self._past_cache(at, data[at - start : min(at + ROOM, last) - start])
        self._through_cache(last, data[last - start :])

    def _past_cache(self, start: int, data: Bytes) -> None:
        piece = self.room[: len(data)]
        np.copyto(piece, data)
        try:
            done = os.pwrite(self.direct, piece.data, start)
        except OSError:
            done = 0
        self._through_cache(start + done, piece[done:])  # which is nothing, or says what is wrong

    def _through_cache(self, start: int, data: Bytes) -> None:
        while len(data):
            done = os.pwrite(self.cached, data.data, start)
            start, data = start + done, data[done:]

    def close(self) -> None:
        """A second call does nothing."""
        for number in (self.direct, self.cached):
            if number >= 0:
                os.close(number)
        self.direct = self.cached = -1
