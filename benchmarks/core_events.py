"""How many events a second the core takes in, for a gang of 10,000 nodes, invariants on.

The aim (DESIGN part 7) is 400,000 a second. The events are made beforehand: making them is the
driver's cost. Two mixes, since a healthy beat is one event a poll and says little about the rest:
`beats` (a poll each, one node late in every tenth) and `life` (a start of every node, a beat, a
commit, an exit, a stop of every node, again and again). The peer is the same loop around a function
that does nothing: the ceiling of this interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from perdure.benchmarks.common import Row, options, report
from perdure.runtime.core.core import Core
from perdure.runtime.core.events import (
    Attempt,
    BeatsSeen,
    CheckpointCommitted,
    Event,
    ExitReport,
    GangStarted,
    GangStopped,
    NodeOffer,
    NodesOffered,
    RankExited,
    Started,
)
from perdure.runtime.spec import Budget, JobSpec

NODES, LIVES, BEATS = 10_000, 20, 200_000


def measure(runs: int) -> list[Row]:
    beats, life = _beats(), _life()
    rows: list[Row] = []
    for name, events in (("beats", beats), ("life", life)):
        for peer in ("perdure", "empty loop"):
            rates = [_rate(peer, events) for _ in range(runs)]
            note = f"{NODES:,} nodes" if peer == "perdure" else ""
            rows.append(Row(f"core events, {name}", peer, "events/s", rates, note=note))
    return rows


def _rate(peer: str, events: Sequence[Event]) -> float:
    core = _running()
    step: Callable[[Event], object] = core.step if peer == "perdure" else _nothing
    begun = time.perf_counter()
    for event in events:
        step(event)
    took_s = time.perf_counter() - begun
    if peer == "perdure" and core.state.now_s != events[-1].at_s:
        raise RuntimeError("the core did not take the events in")
    return len(events) / took_s


def _nothing(event: Event) -> tuple[()]:
    return ()


def _names() -> list[str]:
    return [f"node-{i:05d}" for i in range(NODES)]


def _running() -> Core:
    """A core whose first gang of every node has just been launched."""
    spec = JobSpec(
        run="core-events",
        entry="script",
        argv=("train.py",),
        cwd="/",
        store="memory://core-events",
        nnodes=NODES,
        nproc_per_node=8,
        budget=Budget(restarts=10 * LIVES),
    )
    core = Core(spec)
    core.step(Started(at_s=0.0, term=1, counter=0, line=(), by="run"))
    offers = tuple(NodeOffer(name, 8) for name in _names())
    (launch,) = core.step(NodesOffered(at_s=1.0, nodes=offers))
    assert core.state.phase == "launching", launch
    return core


def _beats() -> list[Event]:
    attempt = Attempt(1, 1)
    names = _names()
    return [
        BeatsSeen(
            at_s=2.0 + i,
            attempt=attempt,
            step=i + 1,
            steps_per_s=1.0,
            late=((names[i % NODES], 4.0),) if i % 10 == 0 else (),
        )
        for i in range(BEATS)
    ]


def _life() -> list[Event]:
    names = _names()
    events: list[Event] = []
    for life in range(LIVES):
        at_s, attempt = 10.0 * (life + 1), Attempt(1, life + 1)
        events += [GangStarted(at_s=at_s, attempt=attempt, node=name) for name in names]
        events.append(BeatsSeen(at_s=at_s, attempt=attempt, step=100 * life, steps_per_s=1.0))
        events.append(CheckpointCommitted(at_s=at_s, attempt=attempt, step=100 * life))
        report = ExitReport(rank=7, node=names[0], at_s=at_s, signal=9)
        events.append(RankExited(at_s=at_s, attempt=attempt, report=report))
        events += [GangStopped(at_s=at_s, attempt=attempt, node=name) for name in names]
    return events


if __name__ == "__main__":
    args = options(__doc__.splitlines()[0], 5).parse_args()
    report(measure(args.runs), as_json=args.json)
