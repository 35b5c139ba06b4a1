"""All ranks' beats of one attempt, as the one line that the core and people need.

Healthy beats are neither journaled nor fed one by one to the core. The gang's step is the lowest of
all ranks, 0 until every rank has been heard; its speed is measured over a window, so that one slow
step (a save, an evaluation) does not show as a stop.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from perdure.runtime.core.events import Attempt

WINDOW_S = 15.0
SAVE_AHEAD_S = 2.0  # a save is named so far ahead of the fastest rank
SAVE_AHEAD_STEPS = 2


class Beats:
    def __init__(self, attempt: Attempt, world_size: int, *, restored_step: int = 0) -> None:
        self.attempt = attempt
        self._restored_step = restored_step
        self._world_size = world_size
        self._ranks: dict[int, dict[str, Any]] = {}
        self._samples: deque[tuple[float, int]] = deque()  # (time, the gang's step)
        self.fresh = False  # something came since `seen()` was last asked

    def take(self, ranks: dict[str, dict[str, Any]], now_s: float) -> None:
        """One node's `ranks` of a `beat`. Raises ValueError or TypeError on what does not fit."""
        for rank, beat in ranks.items():
            if not isinstance(beat["step"], int):
                raise TypeError(f"step {beat['step']!r}")
            self._ranks[int(rank)] = beat
        self.fresh = True
        step = self.step
        if self._samples and self._samples[-1][1] < self._restored_step <= step:
            # Counted by its optimizer first, then by its own `run.beat`: a jump, and no speed.
            self._samples.clear()
        if step > 0 and (not self._samples or step != self._samples[-1][1]):
            self._samples.append((now_s, step))
            while self._samples and self._samples[0][0] < now_s - WINDOW_S:
                self._samples.popleft()

    @property
    def step(self) -> int:
        if len(self._ranks) < self._world_size:
            return 0
        return min(int(beat["step"]) for beat in self._ranks.values())

    @property
    def steps_per_s(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        (begin_s, first), (end_s, last) = self._samples[0], self._samples[-1]
        return max(0.0, (last - first) / (end_s - begin_s)) if end_s > begin_s else 0.0

    @property
    def can_save(self) -> bool:
        return any(beat.get("uses_due") for beat in self._ranks.values())

    def newest(self, key: str) -> float | None:
        """`loss` or `total` of the lowest rank that gives one."""
        for rank in sorted(self._ranks):
            value = self._ranks[rank].get(key)
            if isinstance(value, int | float) and not math.isnan(value):
                return value
        return None

    def save_step(self, above: int = 0) -> int:
        """A step that no rank has reached when word of it arrives; later than `above`."""
        fastest = max((beat["step"] for beat in self._ranks.values()), default=0)
        ahead = max(SAVE_AHEAD_STEPS, math.ceil(self.steps_per_s * SAVE_AHEAD_S))
        return max(fastest, above) + ahead
