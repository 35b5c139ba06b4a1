"""What a simulated world is made of: machines with agents, gangs of ranks, a script."""

from __future__ import annotations

from dataclasses import dataclass, field

from perdure.runtime.core.events import Attempt, ExitReport, Member, RestorePoint


@dataclass(slots=True)
class Node:
    """A machine with at most one agent; `incarnation` tells one agent from the next."""

    name: str
    agent: bool = False
    starting: bool = False
    incarnation: int = 0
    broken_until: float = 0.0  # the machine itself
    cut_until: float = 0.0  # from the controller, and from all who are not on its side
    side: int = 0
    answered: float = 0.0  # its last answered beat
    frozen_until: float = 0.0
    stuck_until: float = 0.0  # its processes do not die, its agent lives
    term: int = 0
    attempt: Attempt | None = None
    stopped: Attempt | None = None  # nothing up to this may run
    members: tuple[Member, ...] = ()
    restore: RestorePoint | None = None
    ranks: set[int] = field(default_factory=set)
    ended: dict[int, ExitReport] = field(default_factory=dict)
    lease_until: float = 0.0
    link_free_at: float = 0.0
    lose_acks: int = 0
    delay_acks_s: float = 0.0
    fail_launches: int = 0

    def hears(self, now: float) -> bool:
        return self.agent and now >= self.cut_until and now >= self.frozen_until

    def sees(self, other: Node, now: float) -> bool:
        mine = self.side if now < self.cut_until else 0
        theirs = other.side if now < other.cut_until else 0
        return mine == theirs and other.agent and now >= other.frozen_until

    def refuses(self, attempt: Attempt) -> bool:
        return self.stopped is not None and attempt <= self.stopped


@dataclass(slots=True)
class Gang:
    """What the ranks of one attempt do together: they step only while all of them can."""

    attempt: Attempt
    members: tuple[Member, ...]
    restore: RestorePoint | None
    loaded: set[str] = field(default_factory=set)
    base: float = 0.0  # step at `since`
    since: float | None = None  # stepping since; None: not stepping
    broken: bool = False
    done: bool = False
    generation: int = 0  # of its plans for the future: a pause voids them
    began_at: float | None = None
    ended_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    rate: float  # steps a second
    total: int
    save_every: int
    takes_orders: bool  # calls run.due
    bug_at: int | None  # raises at this step, each time
