"""What holds for any events in any order: nothing raises, nothing is forgotten by a snapshot.

The events are drawn as numbers and made to fit the core's state more often than chance would, for a
stream of stale attempts and strange nodes would never get past the first phase.
"""

from __future__ import annotations

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.runtime.core.commands import Command
from perdure.runtime.core.core import Core
from perdure.runtime.core.events import (
    AgentAnswer,
    Attempt,
    BeatsSeen,
    CheckpointCommitted,
    CommandFailed,
    Event,
    ExitReport,
    GangStarted,
    GangStopped,
    NodeLost,
    NodeOffer,
    NodesOffered,
    RankExited,
    RestoreFailed,
    RestorePoint,
    SaveAsked,
    Started,
    StopAsked,
    Tick,
    TookOver,
)
from perdure.runtime.core.state import CoreState
from perdure.runtime.spec import Budget, JobSpec, Timers

NODES = ("a", "b", "c", "d")
ANSWERS = ("launch_gang", "stop_gang", "save_now", "request_nodes", "mark_bad", "finish")


class Draw:
    """Small choices out of one drawn number, the same on every replay."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def below(self, n: int) -> int:
        return self.random.randrange(n)

    def node(self, core: Core | None = None) -> str:
        members = core.state.members if core is not None else ()
        if members and self.below(4):
            return members[self.below(len(members))].node
        return NODES[self.below(len(NODES))]

    def attempt(self, core: Core) -> Attempt:
        now = core.state.attempt
        if now is None or self.below(8) == 0:
            return Attempt(1 + self.below(2), self.below(4))
        return now

    def event(self, core: Core, at_s: float) -> Event:
        match self.below(18):
            case 0 | 1:
                offers = tuple(NodeOffer(n, 2) for n in NODES if self.below(4))
                return NodesOffered(at_s=at_s, nodes=offers)
            case 2 | 3 | 4:
                return GangStarted(at_s=at_s, attempt=self.attempt(core), node=self.node(core))
            case 5 | 6 | 7:
                return GangStopped(at_s=at_s, attempt=self.attempt(core), node=self.node(core))
            case 8:
                late = ((self.node(), 3.0 + 5.0 * self.below(3)),)
                return BeatsSeen(
                    at_s=at_s,
                    attempt=self.attempt(core),
                    step=self.below(100),
                    steps_per_s=1.0,
                    late=late if self.below(2) else (),
                    can_save=self.below(2) == 0,
                )
            case 9 | 10:
                return self._exit(core, at_s)
            case 11:
                return NodeLost(at_s=at_s, node=self.node(), why="its port refuses")
            case 12:
                return CheckpointCommitted(
                    at_s=at_s, attempt=self.attempt(core), step=10 * self.below(12)
                )
            case 13:
                point = core.state.restore or RestorePoint(5, Attempt(1, 1))
                return RestoreFailed(
                    at_s=at_s, attempt=self.attempt(core), point=point, rank=0, why="block 3"
                )
            case 14:
                return self._person(at_s)
            case 15:
                return CommandFailed(
                    at_s=at_s,
                    command=ANSWERS[self.below(len(ANSWERS))],
                    attempt=self.attempt(core) if self.below(2) else None,
                    node=self.node() if self.below(2) else None,
                    why="it did not work",
                )
            case 16:
                return self._take_over(core, at_s)
        return Tick(at_s=at_s)

    def _exit(self, core: Core, at_s: float) -> RankExited:
        code = (0, 0, 1, None)[self.below(4)]
        report = ExitReport(
            rank=self.below(5),
            node=self.node(),
            at_s=at_s,
            exit_code=code,
            signal=(6, 9, 11, 15)[self.below(4)] if code is None else None,
            by_us=self.below(6) == 0,
            oom=self.below(6) == 0,
            error="ValueError: x" if code else None,
        )
        return RankExited(at_s=at_s, attempt=self.attempt(core), report=report)

    def _person(self, at_s: float) -> Event:
        if self.below(3):
            return SaveAsked(at_s=at_s, by="a test")
        return StopAsked(at_s=at_s, by="a test", exit_code=130, at_once=self.below(2) == 0)

    def _take_over(self, core: Core, at_s: float) -> TookOver:
        s = core.state
        answers = tuple(
            AgentAnswer(
                node=node,
                attempt=s.attempt if self.below(5) else None,
                members=s.members,
                restore=s.restore,
                running=self.below(5) > 0,
                step=self.below(50),
            )
            for node in NODES
            if self.below(6)
        )
        line = tuple(s.line) if self.below(4) else ()
        return TookOver(at_s=at_s, term=s.term + self.below(2), answers=answers, line=line)


def job() -> Core:
    return Core(
        JobSpec(
            run="any",
            entry="script",
            argv=("train.py",),
            cwd="/",
            store="memory://any",
            nnodes=2,
            nproc_per_node=2,
            spares=1,
            timers=Timers(start_s=60.0),
            budget=Budget(restarts=5),
        )
    )


def play(core: Core, numbers: list[tuple[int, int]]) -> list[tuple[Event, tuple[Command, ...]]]:
    """Events and answers; the core begins as a new run."""
    first = Started(at_s=0.0, term=1, counter=0, line=(), by="run")
    story: list[tuple[Event, tuple[Command, ...]]] = [(first, core.step(first))]
    at_s = 0.0
    for seed, wait in numbers:
        at_s += (0.0, 0.1, 1.0, 12.0, 70.0)[wait]
        event = Draw(seed).event(core, at_s)
        story.append((event, core.step(event)))
    return story


streams = st.lists(st.tuples(st.integers(0, 2**48), st.integers(0, 4)), min_size=5, max_size=60)


@settings(max_examples=300, deadline=None)
@given(streams)
def test_any_event_in_any_state_is_answered(numbers: list[tuple[int, int]]) -> None:
    core = job()
    play(core, numbers)  # InvariantBroken would be raised here
    core.status()
    now = core.state.now_s
    core.step(Tick(at_s=now))
    due = core.deadline_s()
    assert due is None or due > now, "a Tick must not leave its own deadline behind"
    assert (due is None) <= (core.state.phase in ("running", "finished"))


@settings(max_examples=100, deadline=None)
@given(streams, st.integers(0, 60))
def test_a_core_from_a_snapshot_goes_on_as_the_first_would(
    numbers: list[tuple[int, int]], cut: int
) -> None:
    core = job()
    story = play(core, numbers)
    twin = job()
    for i, (event, commands) in enumerate(story):
        if i == cut:
            text = json.dumps(twin.state.to_json())
            twin = Core(twin.spec, CoreState.from_json(json.loads(text)))
        assert twin.step(event) == commands
    assert twin.state == core.state
    assert twin.status() == core.status()


def test_the_draws_reach_every_phase() -> None:
    """The properties above are empty if the draws never leave the first phase."""
    reached: dict[str, int] = {}
    draws = random.Random(1)
    for _ in range(300):
        core = job()
        at_s = 0.0
        core.step(Started(at_s=0.0, term=1, counter=0, line=(), by="run"))
        for _ in range(40):
            at_s += draws.choice((0.0, 0.1, 1.0, 12.0, 70.0))
            core.step(Draw(draws.randrange(2**48)).event(core, at_s))
            reached[core.state.phase] = reached.get(core.state.phase, 0) + 1
    wanted = {"waiting", "launching", "running", "saving", "stopping", "finished"}
    assert {phase for phase, times in reached.items() if times >= 5} == wanted, reached
