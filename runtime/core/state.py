"""All that the core knows, in one value that goes to the journal and comes back.

One mutable dataclass and nothing beside it: whatever a decision depends on is here, so a snapshot is
complete, a new controller goes on where the old one was, and replaying the events from a snapshot
gives the same commands. Only `moves.py`, `takeover.py` and `core.py` change it. Sets and dicts are
never iterated into a command unsorted: their order must not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self, cast

from perdure.runtime.core import codec
from perdure.runtime.core.events import Attempt, ExitReport, Member, RestorePoint, Tier

Phase = Literal["new", "waiting", "launching", "running", "saving", "stopping", "finished"]
Blame = Literal[
    "user", "out_of_memory", "device", "node", "network", "storage", "preemption", "unknown"
]

FAULTS_KEPT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What people are shown of one fault."""

    at_s: float
    kind: str  # rank_exit, rank_signal, node_lost, node_silent, restore_failed, ...
    blame: Blame
    rank: int | None
    node: str | None
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One thing that may have ended an attempt; `policy.judge` picks the one that did."""

    fault: Fault
    weight: int  # lower is nearer to the root; equals are decided by time
    exit_code: int  # what the job ends with, should this be what ends it
    signature: str = ""  # the same again is the same failure; "" never counts as no progress


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWish:
    by: str
    exit_code: int


@dataclass(slots=True, kw_only=True)
class CoreState:
    phase: Phase = "new"
    because: str = ""
    waiting_for: str = ""  # the cluster's words
    now_s: float = 0.0  # time of the newest event; never falls
    term: int = 0
    counter: int = 0  # the highest ever launched

    # The newest attempt; kept after its end, for its nodes keep their places.
    attempt: Attempt | None = None
    members: tuple[Member, ...] = ()
    restore: RestorePoint | None = None
    started: set[str] = field(default_factory=set)  #: members that answered GangStarted
    exits: dict[int, ExitReport] = field(default_factory=dict)  #: first report of each rank
    causes: list[Cause] = field(default_factory=list)  #: what else may have ended it
    stopping: set[str] = field(default_factory=set)  #: members told to stop, not yet answered
    silent: dict[str, float] = field(default_factory=dict)
    #: members given up for their silence alone -> when last heard
    step: int = 0
    first_step: int | None = None
    steps_per_s: float = 0.0
    can_save: bool = False

    # Nodes. A node is usable when it is offered and in none of the other three.
    offered: dict[str, int] = field(default_factory=dict)  #: node -> slots
    excluded: dict[str, float] = field(default_factory=dict)  #: node -> until when
    away: set[str] = field(default_factory=set)  #: lost; may hold processes of ours
    cleaning: dict[str, tuple[float, Attempt]] = field(default_factory=dict)
    #: came back, told to stop all up to that attempt, to be answered by that time
    losses: dict[str, int] = field(default_factory=dict)  #: how often each node failed us

    # Checkpoints.
    line: list[RestorePoint] = field(default_factory=list)  #: newest first, none of them bad
    bad: list[RestorePoint] = field(default_factory=list)
    had_commit: bool = False  # then a start from nothing would lose work: never done silently
    committed_at_s: float | None = None
    tier: Tier = "store"

    # What a person asked for.
    stop: StopWish | None = None
    save_wanted: str = ""  # by whom

    # Deadlines, each meaningful in its phase only.
    place_by_s: float = 0.0
    start_by_s: float = 0.0
    save_by_s: float = 0.0
    save_from: int = 0  # a commit of this step or later answers the save before a stop
    stop_by_s: float = 0.0
    hold_until_s: float = 0.0  # no launch before: a node that did not answer must fence first

    # Budgets.
    restarts: list[float] = field(default_factory=list)  #: times, within the window
    restarts_total: int = 0
    script_restarts: int = 0  # those that count against --max-restarts
    furthest: int = 0  # the highest step that any earlier attempt reached
    barren: list[str] = field(
        default_factory=list
    )  #: signatures of ends without progress, in a row
    faults: list[Fault] = field(default_factory=list)
    root: ExitReport | None = None  # of the last fault that was a rank's end
    exit_code: int | None = None

    def to_json(self) -> codec.JsonObject:
        return cast(codec.JsonObject, codec.encode(self))

    @classmethod
    def from_json(cls, raw: Mapping[str, codec.Json]) -> Self:
        """Raises ValueError when `raw` is no snapshot."""
        return codec.decode(cls, dict(raw))

    def note(self, fault: Fault) -> None:
        self.faults.append(fault)
        del self.faults[:-FAULTS_KEPT]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What people are shown; DESIGN part 6 names the keys of its JSON."""

    phase: Phase
    because: str
    waiting_for: str
    attempt: Attempt | None
    step: int
    steps_per_s: float
    restore: RestorePoint | None  # what the newest attempt began from
    commit: RestorePoint | None  # the newest on the line
    committed_at_s: float | None
    members: tuple[Member, ...]
    spares: tuple[str, ...]
    faults: tuple[Fault, ...]
    restarts: int
    root_cause: ExitReport | None
    stop_asked_by: str
    exit_code: int | None
