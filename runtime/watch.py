"""What the driver's loop sleeps on: descriptors, each with what to do when it has news.

epoll rather than `selectors`, because links close themselves: the kernel forgets a closed descriptor
and may give its number to the next connection at once. So an entry is looked up by number and checked
by identity, and `settle()` drops what has ended and follows each link's wish to write.
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable
from typing import Protocol


class Watched(Protocol):
    def fileno(self) -> int: ...


class Watch:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._entries: dict[int, tuple[Watched, Callable[[], None], int]] = {}

    def add(self, watched: Watched, on_news: Callable[[], None]) -> None:
        mask = _mask(watched)
        self._entries[watched.fileno()] = (watched, on_news, mask)
        self._epoll.register(watched.fileno(), mask)

    def wait(self, timeout_s: float) -> None:
        """Sleep until there is news or the time is over, then hand the news out."""
        self._settle()
        # Rounded up: waking a moment before a deadline would spin until it has passed.
        timeout_s = math.ceil(max(0.0, timeout_s) * 1000) / 1000
        for fd, _ in self._epoll.poll(timeout_s):
            entry = self._entries.get(fd)
            if entry is not None and not _ended(entry[0]):
                entry[1]()

    def close(self) -> None:
        self._epoll.close()

    def _settle(self) -> None:
        for fd, (watched, on_news, mask) in list(self._entries.items()):
            if _ended(watched):
                del self._entries[fd]
            elif (wish := _mask(watched)) != mask:
                self._epoll.modify(fd, wish)
                self._entries[fd] = (watched, on_news, wish)


def _ended(watched: Watched) -> bool:
    return getattr(watched, "broken", None) is not None


def _mask(watched: Watched) -> int:
    return select.EPOLLIN | (select.EPOLLOUT if getattr(watched, "wants_write", False) else 0)
