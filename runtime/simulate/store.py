"""The part of the run's folder that decisions rest on: commits, bad marks, who restored what."""

from __future__ import annotations

from collections.abc import Mapping

from perdure.runtime.core.events import Attempt, RestorePoint


class Store:
    def __init__(self) -> None:
        self.commits: dict[RestorePoint, bool] = {}  # whether its bytes are corrupt
        self.bad: set[RestorePoint] = set()
        self.told: set[RestorePoint] = set()  # commits that a controller has heard of
        self.restored: dict[Attempt, RestorePoint | None] = {}  # the attempts' records

    def line(
        self, restored: Mapping[Attempt, RestorePoint | None] | None = None
    ) -> tuple[RestorePoint, ...]:
        """Newest first: the newest recorded attempt's commits, then its ancestors' (DESIGN part 4).

        `restored`: what each attempt really began from, where the records may lag behind.
        """
        line: list[RestorePoint] = []
        records = self.restored if restored is None else restored
        attempt = max(records, default=None)
        below: RestorePoint | None = None
        while attempt is not None:
            own = [
                p
                for p in self.commits
                if p.attempt == attempt and (below is None or p.step <= below.step)
            ]
            line += sorted(own, reverse=True)
            below = records.get(attempt)
            attempt = below.attempt if below is not None else None
        return tuple(p for p in line if p not in self.bad)
