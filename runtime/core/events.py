"""What happened: facts in the past tense, stamped by the driver, fenced by attempt.

`at_s` is seconds since the epoch on the driver's clock and never falls. Frozen at the border; the
JSON form (`codec.py`) is what the journal holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from perdure.runtime.jsonform import misfit

_ATTEMPT = re.compile(r"^(\d{1,12})\.(\d{1,12})$")
Tier = Literal["memory", "store"]


class Attempt(NamedTuple):
    """One number per gang launch, global, only ever rising."""

    term: int  # taken by a controller with a create-only key
    counter: (
        int  # rises with each launch, over all terms: TORCHELASTIC_RESTART_COUNT is counter - 1
    )

    def __str__(self) -> str:
        return f"{self.term}.{self.counter}"

    def json_form(self) -> str:
        return str(self)

    @classmethod
    def from_json_form(cls, raw: object) -> Attempt:
        found = _ATTEMPT.match(raw) if isinstance(raw, str) else None
        if found is None:
            raise misfit("an attempt, 'term.counter'", raw)
        return cls(int(found[1]), int(found[2]))


class RestorePoint(NamedTuple):
    """A committed checkpoint: which step, and the attempt that wrote it."""

    step: int
    attempt: Attempt

    def json_form(self) -> dict[str, int | str]:
        return {"step": self.step, "attempt": str(self.attempt)}

    @classmethod
    def from_json_form(cls, raw: object) -> RestorePoint:
        if not isinstance(raw, dict) or type(raw.get("step")) is not int:
            raise misfit("a restore point, {step, attempt}", raw)
        return cls(raw["step"], Attempt.from_json_form(raw.get("attempt")))


class Member(NamedTuple):
    """One node's part of a gang: its ranks are first_rank .. first_rank + nproc - 1."""

    node: str
    group_rank: int
    first_rank: int
    nproc: int


class NodeOffer(NamedTuple):
    node: str
    slots: int  # ranks it can hold


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitReport:
    """How one rank process ended. Exactly one of exit_code and signal is set."""

    rank: int
    node: str
    at_s: float  # when the agent saw it, on the driver's clock
    exit_code: int | None = None
    signal: int | None = None
    by_us: bool = False  # the agent killed it, as told: says nothing of a cause
    oom: bool = False  # the kernel's out-of-memory killer was seen at work in its cgroup
    error: str | None = None  # last line of the traceback: "ValueError: ..."
    where: str | None = None  # "train.py:31 in main": the innermost frame of the script
    traceback: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentAnswer:
    """What a living agent says to a new controller."""

    node: str
    attempt: Attempt | None  # the highest that it was told to launch
    members: tuple[Member, ...]  # of that attempt: the whole gang, not only this node
    restore: RestorePoint | None  # of that attempt
    running: bool  # all its ranks of that attempt live, or ended with 0
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """First event of a run, and of a `resume` on a new cluster. `line`: newest first."""

    at_s: float
    term: int
    counter: int  # the highest counter ever used; 0 for a new run
    line: tuple[RestorePoint, ...]
    by: str  # "run", "resume", "resume --step 40": shown to people


@dataclass(frozen=True, slots=True, kw_only=True)
class TookOver:
    """A new controller of a living run: its state was loaded from the journal, the agents asked."""

    at_s: float
    term: int
    answers: tuple[AgentAnswer, ...]
    line: tuple[RestorePoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesOffered:
    """The whole set of nodes whose agents are up and may be used now, spares included."""

    at_s: float
    nodes: tuple[NodeOffer, ...]
    waiting_for: str = ""  # the cluster's words when it is short: shown while the job waits


@dataclass(frozen=True, slots=True, kw_only=True)
class GangStarted:
    """The agent of `node` has started its ranks of `attempt`."""

    at_s: float
    attempt: Attempt
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatsSeen:
    """One a poll. `step`: the lowest of all ranks; `late`: nodes and how long they are silent."""

    at_s: float
    attempt: Attempt
    step: int
    steps_per_s: float
    late: tuple[tuple[str, float], ...] = ()
    can_save: bool = False  # some rank of this attempt has called `run.due`


@dataclass(frozen=True, slots=True, kw_only=True)
class RankExited:
    at_s: float
    attempt: Attempt
    report: ExitReport


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLost:
    """The agent of `node` is gone: its port refuses, or its cluster says that it died."""

    at_s: float
    node: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GangStopped:
    """No process of `attempt` (nor of an earlier one) is left on `node`."""

    at_s: float
    attempt: Attempt
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommitted:
    at_s: float
    attempt: Attempt
    step: int
    tier: Tier = "store"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreFailed:
    """A rank could not verify what it read. `point` is the commit that `attempt` was told to restore."""

    at_s: float
    attempt: Attempt
    point: RestorePoint
    rank: int
    why: str  # names the object


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveAsked:
    at_s: float
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    at_s: float
    by: str
    exit_code: int  # what the job then ends with: 130, 143, 129, or 0 for `perdure stop`
    at_once: bool = False  # asked twice: no save, no grace


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandFailed:
    """A command could not be carried out: `command` is its JSON kind."""

    at_s: float
    command: str
    attempt: Attempt | None
    node: str | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    at_s: float


Event = (
    Started
    | TookOver
    | NodesOffered
    | GangStarted
    | BeatsSeen
    | RankExited
    | NodeLost
    | GangStopped
    | CheckpointCommitted
    | RestoreFailed
    | SaveAsked
    | StopAsked
    | CommandFailed
    | Tick
)
