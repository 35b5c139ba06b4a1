"""Blame and places, where a transcript would say too much."""

from __future__ import annotations

import pytest

from perdure.runtime import causes
from perdure.runtime.core import invariants, policy
from perdure.runtime.core.commands import Command, Finish, LaunchGang, StopGang
from perdure.runtime.core.core import Core
from perdure.runtime.core.events import Attempt, ExitReport, Member, RestorePoint, Started
from perdure.runtime.core.state import Cause, CoreState, Fault
from perdure.runtime.errors import InvariantBroken
from perdure.runtime.spec import JobSpec


def report(**more: object) -> ExitReport:
    return ExitReport(rank=1, node="a", at_s=1.0, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exit", "blame", "weight", "counts"),
    [
        (report(exit_code=1, error="ValueError: x"), "user", causes.ERROR, True),
        (report(exit_code=3), "user", causes.ERROR, True),
        (report(signal=9), "unknown", causes.OUTSIDE, False),
        (report(signal=9, oom=True), "out_of_memory", causes.OUTSIDE, True),
        (report(signal=9, by_us=True), "network", causes.OURS, False),
        (report(signal=9, by_us=True, error="ValueError: x"), "user", causes.ERROR, True),
        (report(signal=15), "preemption", causes.OUTSIDE, False),
        (report(signal=11), "unknown", causes.OUTSIDE, True),
        (report(signal=6), "unknown", causes.ERROR, True),
        (report(exit_code=1, error="ConnectionResetError: [Errno 104]"), "network", 4, False),
        (report(exit_code=1, error="torch.OutOfMemoryError: CUDA"), "out_of_memory", 3, True),
        (report(exit_code=1, error="CUDA error: uncorrectable ECC error"), "device", 3, True),
        (report(exit_code=1, error="OSError: No space left on device"), "storage", 3, True),
    ],
)
def test_blame_of_an_exit(exit: ExitReport, blame: str, weight: int, counts: bool) -> None:
    cause = causes.cause_of_exit(exit)
    assert (cause.fault.blame, cause.weight, bool(cause.signature)) == (blame, weight, counts)


def test_a_failure_that_differs_in_numbers_is_the_same() -> None:
    first = causes.cause_of_exit(report(exit_code=1, error="Error at 0x7f3a, index 17"))
    second = causes.cause_of_exit(report(exit_code=1, error="Error at 0x99, index 2"))
    other = causes.cause_of_exit(report(exit_code=1, error="Error at 0x99, key 2"))
    assert first.signature == second.signature != other.signature


def spec(**more: object) -> JobSpec:
    fixed = {"run": "r", "entry": "script", "argv": ("t.py",), "cwd": "/", "store": "memory://r"}
    return JobSpec(**{**fixed, "nnodes": 2, **more})  # type: ignore[arg-type]


def test_places_go_to_the_nodes_that_failed_least() -> None:
    state = CoreState(
        members=(Member("b", 0, 0, 1), Member("a", 1, 1, 1)), losses={"c": 2, "d": 1, "e": 0}
    )
    gang = policy.choose_gang(spec(nnodes=4), state, ["a", "b", "c", "d", "e"])
    assert [m.node for m in gang] == ["b", "a", "e", "d"]
    assert policy.choose_gang(spec(nnodes=6), state, ["a", "b", "c", "d", "e"]) == ()


def test_a_node_that_could_not_start_keeps_its_place_only_if_there_is_no_other() -> None:
    fault = Fault(at_s=0, kind="launch_failed", blame="unknown", rank=None, node="a", because="x")
    state = CoreState(
        members=(Member("a", 0, 0, 1), Member("b", 1, 1, 1)),
        causes=[Cause(fault=fault, weight=causes.START, exit_code=1)],
    )
    assert [m.node for m in policy.choose_gang(spec(), state, ["a", "b", "c"])] == ["c", "b"]
    assert [m.node for m in policy.choose_gang(spec(), state, ["a", "b"])] == ["a", "b"]


GANG = (Member("a", 0, 0, 1), Member("b", 1, 1, 1))


def launching(**more: object) -> CoreState:
    fixed = {"phase": "launching", "term": 1, "counter": 1, "attempt": Attempt(1, 1)}
    return CoreState(**{**fixed, "members": GANG, **more})  # type: ignore[arg-type]


def launch(members: tuple[Member, ...] = GANG, restore: RestorePoint | None = None) -> LaunchGang:
    return LaunchGang(attempt=Attempt(1, 1), members=members, restore=restore, because="test")


POINT = RestorePoint(4, Attempt(1, 0))


@pytest.mark.parametrize(
    ("state", "command", "says"),
    [
        (launching(stopping={"a"}), launch(), "had not stopped"),
        (launching(away={"b"}), launch(), "lost, unclean or excluded"),
        (launching(counter=2), launch(), "is not the next"),
        (launching(), launch(GANG[:1]), "a gang of 1 nodes"),
        (launching(), launch((GANG[0], Member("b", 1, 0, 1))), "not its place's"),
        (launching(bad=[POINT], had_commit=True), launch(restore=POINT), "marked bad"),
        (launching(had_commit=True), launch(), "start from nothing"),
        (launching(started={"a"}), launch(), "held against the next"),
        (launching(restarts=[0.0] * 101), launch(), "101 restarts"),
        (
            launching(),
            StopGang(attempt=Attempt(1, 2), nodes=("a",), grace_s=0, because="x"),
            "a stop of 1.2",
        ),
        (
            CoreState(phase="stopping", attempt=Attempt(1, 1)),
            StopGang(attempt=Attempt(1, 1), nodes=("a",), grace_s=0, because="x"),
            "nobody has to answer",
        ),
        (CoreState(phase="finished"), launch(), "went on"),
    ],
)
def test_each_invariant_can_break(state: CoreState, command: Command, says: str) -> None:
    with pytest.raises(InvariantBroken, match=says):
        invariants.check(spec(), state, [command])


def test_what_keeps_the_law_passes() -> None:
    invariants.check(spec(), launching(), [launch()])
    invariants.check(spec(), CoreState(phase="finished"), [Finish(exit_code=0, because="x")])


def test_the_restore_point_does_not_go_back_past_a_good_commit() -> None:
    newer = RestorePoint(8, Attempt(1, 0))
    invariants.check_restore(CoreState(restore=newer, line=[POINT], bad=[newer]))
    with pytest.raises(InvariantBroken, match="go back"):
        invariants.check_restore(CoreState(restore=newer, line=[POINT]))


def test_a_phase_changes_only_along_the_table() -> None:
    core = Core(spec())
    core.step(Started(at_s=0.0, term=1, counter=0, line=(), by="run"))
    with pytest.raises(InvariantBroken, match="from waiting to saving"):
        core.move("saving", "a test")
