"""The driver's clock: seconds since the epoch that never fall, whatever happens to the wall clock."""

from __future__ import annotations

import time


class Clock:
    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()
        self._last_s = 0.0

    def now_s(self) -> float:
        return self._offset_s + time.monotonic()

    def stamp_s(self) -> float:
        """A time for one event: later than that of every event before it."""
        self._last_s = max(self.now_s(), self._last_s + 1e-6)
        return self._last_s
