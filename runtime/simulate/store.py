"""The part of the run's folder that decisions rest on: commits, bad marks, who restored what."""

from __future__ import annotations

from perdure.runtime.core.events import Attempt, RestorePoint


class Store:
    def __init__(self) -> None:
        self.commits: dict[RestorePoint, bool] = {}  # whether its bytes are corrupt
        self.bad: set[RestorePoint] = set()
        self.restored: dict[Attempt, RestorePoint | None] = {}  # the attempts' records

    def line(self) -> tuple[RestorePoint, ...]:
        """Newest first: the newest recorded attempt's commits, then its ancestors' (DESIGN part 4)."""
        line: list[RestorePoint] = []
        attempt = max(self.restored, default=None)
        below: RestorePoint | None = None
        while attempt is not None:
            own = [
                p
                for p in self.commits
                if p.attempt == attempt and (below is None or p.step <= below.step)
            ]
            line += sorted(own, reverse=True)
            below = self.restored.get(attempt)
            attempt = below.attempt if below is not None else None
        return tuple(p for p in line if p not in self.bad)
