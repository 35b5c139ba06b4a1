"""The simulator is a test of the core; this is a test of the simulator: that its checks can fail."""

from __future__ import annotations

import json

import pytest

from perdure.runtime.core import policy
from perdure.runtime.core.core import Core
from perdure.runtime.core.events import Attempt, Event, RankExited, RestorePoint, Started
from perdure.runtime.core.moves import Moves
from perdure.runtime.core.state import CoreState
from perdure.runtime.errors import InvariantBroken
from perdure.runtime.simulate import __main__ as command_line
from perdure.runtime.simulate.checks import Violation
from perdure.runtime.simulate.run import run_seed
from perdure.runtime.simulate.store import Store

SEEDS = range(60)


def failures() -> list[int]:
    failed = []
    for seed in SEEDS:
        try:
            run_seed(seed)
        except (Violation, InvariantBroken):
            failed.append(seed)
    return failed


@pytest.mark.slow
def test_the_core_holds_and_the_faults_fire() -> None:
    outcomes = [run_seed(seed) for seed in SEEDS]
    fired = sum((o.fired for o in outcomes), outcomes[0].fired.copy())
    for kind in ("rank_kill", "node_kill", "node_freeze", "controller_died", "restore_failed"):
        assert fired[kind] > 0, kind
    assert {o.exit_code for o in outcomes} >= {0, 93}


def test_a_run_is_a_function_of_its_seed() -> None:
    assert run_seed(7) == run_seed(7)
    assert run_seed(7).events != run_seed(8).events


@pytest.mark.slow
def test_a_core_that_does_not_wait_for_the_fence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(self: Moves, because: str, grace_s: float = 0.0) -> None:
        s = self.state
        s.stopping = set()
        self.move("stopping", because)
        self.stopped()

    monkeypatch.setattr(Moves, "stop", hasty)
    assert failures()


@pytest.mark.slow
def test_a_core_that_forgets_commits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(state: CoreState, point: RestorePoint) -> bool:
        return False

    monkeypatch.setattr(policy, "keeps_on_line", blind)
    assert failures()


@pytest.mark.slow
def test_a_core_that_never_restarts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Core.step

    def deaf(self: Core, event: Event) -> tuple[object, ...]:
        return () if isinstance(event, RankExited) else honest(self, event)

    monkeypatch.setattr(Core, "step", deaf)
    assert failures()


def test_the_line_follows_what_each_attempt_restored() -> None:
    store = Store()
    first, second = Attempt(1, 1), Attempt(1, 2)
    old, forgotten = RestorePoint(20, first), RestorePoint(40, first)
    new = RestorePoint(30, second)
    store.commits = {old: False, forgotten: False, new: False}
    store.restored = {first: None, second: old}
    assert store.line() == (new, old)
    store.bad.add(new)
    assert store.line() == (old,)


def test_the_command_line_reports_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--seeds", "3", "--seed", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["invariants_ok"] is True and report["seed"] == 5
    assert 0 < report["ettr"] <= 1 and set(report) >= {"loss", "events_per_s"}


def test_the_command_line_says_which_seed_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Core, event: Started) -> None:
        raise InvariantBroken("a test", hint="none")

    monkeypatch.setattr(Core, "_started", broken)
    assert command_line.main(["--seeds", "1", "--seed", "42"]) == 1
    assert "seed 42: InvariantBroken: a test" in capsys.readouterr().out
