"""What to do: imperatives, each with its reason in plain words.

A command's outcome, also its failure, comes back as an event. Carrying out is idempotent by attempt:
performing a command twice is performing it once.
"""

from __future__ import annotations

from dataclasses import dataclass

from perdure.runtime.core.events import Attempt, Member, RestorePoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestNodes:
    """Have `count` nodes ready, gang and spares together, none of `exclude` among them."""

    count: int
    exclude: tuple[str, ...]
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchGang:
    """Start every rank of `attempt`. Answered by GangStarted for each node."""

    attempt: Attempt
    members: tuple[Member, ...]
    restore: RestorePoint | None
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopGang:
    """End every process of `attempt` and of all before it, on `nodes`. Answered by GangStopped.

    grace_s 0: SIGKILL at once (a gang that lost a rank is dead, and waiting is lost time).
    """

    attempt: Attempt
    nodes: tuple[str, ...]
    grace_s: float
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveNow:
    """Make `run.due` true at the same step on every rank; the driver names the step."""

    attempt: Attempt
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkBad:
    """Write down that this commit must never be restored."""

    point: RestorePoint
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The job is over: release everything, end the journal, exit with `exit_code`."""

    exit_code: int
    because: str


Command = RequestNodes | LaunchGang | StopGang | SaveNow | MarkBad | Finish
