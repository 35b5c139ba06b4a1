"""Memory that a rank fills and the uploader sends, and that outlives the rank.

An arena is a memfd: it has no name to leak and no /dev/shm limit, and its pages stay for as long as
one process holds the descriptor. The uploader makes it and keeps it; the rank maps it. So a rank
that is killed after `staged` loses nothing: the bytes are in the uploader's hands.

The first touch of a page costs some thirty times a warm copy, so a rank populates its mapping in
the background before the first save. That thread makes no Python object while it works and ends
by itself; a save that comes earlier stops it and goes on with whatever is there.

Nothing here knows torch: both sides import it. Mappings are never closed by hand: views into them
may be alive anywhere, so they go with their last reference.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading

PAGE = mmap.PAGESIZE
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it
_POPULATE_BYTES = 16 << 20  # one step of the background thread: some 20 ms
_libc = ctypes.CDLL(None, use_errno=True)


def make_memfd(name: str, size: int) -> int:
    """A memfd of `size` bytes whose size is sealed: no peer can make another's mapping fault."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, max(size, PAGE))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(fd)
        raise
    return fd


class Arena:
    """A mapping of one memfd in this process. `id` is the uploader's name for it."""

    def __init__(self, fd: int, size: int, id: int = 0) -> None:
        """Maps `size` bytes of `fd` and closes `fd`: the mapping keeps the memory."""
        self.id = id
        self.size = size
        try:
            self.map = mmap.mmap(fd, max(size, PAGE))
        finally:
            os.close(fd)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._whole = False  # every page is mapped here

    def populate(self) -> None:
        """Start mapping every page in the background; idempotent."""
        if self._thread is None and not self._whole:
            self._thread = threading.Thread(
                target=self._populate, name="perdure-populate", daemon=True
            )
            self._thread.start()

    def populated(self, timeout_s: float | None = 0) -> bool:
        """Whether every page is mapped; waits at most `timeout_s` (None: until it is)."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._whole

    def stop_populating(self) -> None:
        """Returns when no thread works on this arena any more (bounded by one step)."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _populate(self) -> None:
        held = ctypes.c_char.from_buffer(self.map)
        base, total = ctypes.addressof(held), len(self.map)
        for begin in range(0, total, _POPULATE_BYTES):
            length = min(_POPULATE_BYTES, total - begin)
            if self._stop.is_set():
                return
            if _libc.madvise(
                ctypes.c_void_p(base + begin), ctypes.c_size_t(length), _MADV_POPULATE_WRITE
            ):
                # An older kernel. Writing zeros does the same, and nobody else writes yet: a save
                # stops this thread before it copies.
                ctypes.memset(base + begin, 0, length)
        self._whole = True
