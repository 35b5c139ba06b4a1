"""The driver's one thread: everything that waits for the store is done here, and only that.

The loop must never wait for a store: an outage may stop commits and the journal, never a restart.
So work goes in as a function, its result (or the exception it raised) comes back in the loop's own
thread, when the loop sees the wake-up descriptor and calls `drain()`. One thread, so that puts stay in
order; the work itself must be bounded in time, which every store call is.

The same descriptor wakes the loop for anything else: a signal handler or another thread calls `wake()`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

Then = Callable[[Any], None]  # takes the result, or the exception


class StoreWorker:
    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[tuple[Callable[[], Any], Then] | None] = queue.SimpleQueue()
        self._done: deque[tuple[Then, Any]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._work, name="perdure-store", daemon=True)
        self._thread.start()
        self.pending = 0  # submitted, and their results not yet drained

    def fileno(self) -> int:
        return self._wake_fd

    def submit(self, work: Callable[[], Any], then: Then) -> None:
        """Do `work` in the thread; `then` gets its result, or the exception, in `drain()`."""
        self.pending += 1
        self._todo.put((work, then))

    def wake(self) -> None:
        """Wake the loop. Safe in a signal handler and in any thread."""
        os.eventfd_write(self._wake_fd, 1)

    def drain(self) -> None:
        """Hand out what is done; call when the descriptor is readable, in the loop's thread."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while self._done:
            then, result = self._done.popleft()
            self.pending -= 1
            then(result)

    def close(self, timeout_s: float) -> bool:
        """Let the queue run empty, at most `timeout_s`. False: something still waits for the store."""
        self._todo.put(None)
        self._thread.join(timeout_s)
        ended = not self._thread.is_alive()
        if ended:
            self.drain()
            os.close(self._wake_fd)
        return ended

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            work, then = job
            try:
                result: Any = work()
            except Exception as error:  # noqa: BLE001  the loop decides what a failure means
                result = error
            self._done.append((then, result))
            self.wake()
