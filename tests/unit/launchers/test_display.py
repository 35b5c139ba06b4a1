"""What is shown while a job runs. Golden texts; the live rows are drawn without a terminal."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Sequence

from rich.console import Console

from perdure.launchers.commands_ask import told
from perdure.launchers.display import Display, JsonLines, Plain, summary
from perdure.launchers.screen import rows
from perdure.launchers.view import Json, RunView

T = 1_700_000_000.0
FAULT = {
    "at": T + 30.0,
    "kind": "rank_signal",
    "blame": "unknown",
    "rank": 1,
    "node": "local-0",
    "because": "rank 1 on local-0 was ended by SIGKILL",
}
RUNNING: Json = {
    "run": "train-1124-093000-k3xq",
    "phase": "running",
    "attempt": "1.2",
    "step": 1240,
    "total_steps": 5000,
    "steps_per_s": 12.4,
    "loss": 2.3145,
    "world_size": 2,
    "nodes": ["local-0"],
    "spares": [],
    "restarts": 1,
    "faults": [FAULT],
    "checkpoint": {"step": 1200, "tier": "store", "at": T + 88.0},
    "because": "every rank has started",
}
TRACEBACK = (
    'Traceback (most recent call last):\n  File "t.py", line 3, in <module>\nValueError: no\n'
)
FAILED: Json = {
    **RUNNING,
    "phase": "finished",
    "exit_code": 1,
    "because": "rank 1 on local-0 ended with exit code 1: ValueError: no",
    "root_cause": {
        "rank": 1,
        "node": "local-0",
        "error": "ValueError: no",
        "traceback": TRACEBACK,
        "log": "/logs/attempt_1/1/stderr.log",
    },
    "log_dir": "/logs",
}


def launch(attempt: str, at: float, restore: Json | None) -> Json:
    return {
        "kind": "launch_gang",
        "at": at,
        "attempt": attempt,
        "members": [["local-0", 0, 0, 2]],
        "restore": restore,
        "because": "",
    }


def plain() -> tuple[Plain, io.StringIO]:
    out = io.StringIO()
    return Plain(out, clock=lambda at: f"+{at - T:.0f}"), out


def test_plain_lines_of_a_recovery() -> None:
    face, out = plain()
    waiting = {"run": "r", "phase": "waiting", "waiting_for": "1 of 2 nodes: none has 2 free CPUs"}
    face.turn(waiting, [{"kind": "started", "at": T}])
    face.turn(waiting, [])
    face.turn({"phase": "launching"}, [launch("1.1", T + 1, None)])
    for step in (10, 20, 30):  # one a second: the first is told, the others wait their turn
        at = T + 10 + step / 10
        commit = {"kind": "checkpoint_committed", "at": at, "step": step, "tier": "store"}
        face.turn({"phase": "running"}, [commit])
    face.turn(RUNNING, [launch("1.2", T + 30.1, {"step": 30, "attempt": "1.1"})])
    face.turn(RUNNING, [{"kind": "gang_started", "at": T + 31, "node": "local-0"}])
    assert out.getvalue().splitlines() == [
        "perdure +0  waiting for nodes: 1 of 2 nodes: none has 2 free CPUs",
        "perdure +1  attempt 1.1: start with 2 ranks on local-0 from the beginning",
        "perdure +11  checkpoint of step 10 is committed",
        (
            "perdure +30  fault: rank 1 on local-0 was ended by SIGKILL "
            "[blame: unknown, the evidence does not say]"
        ),
        "perdure +30  attempt 1.2: start again with 2 ranks on local-0 from step 30",
    ]


def test_the_last_words_on_a_failure() -> None:
    assert summary(RunView.read(FAILED)) == [
        "root cause: rank 1 on local-0: ValueError: no",
        "  Traceback (most recent call last):",
        '    File "t.py", line 3, in <module>',
        "  ValueError: no",
        "its log: /logs/attempt_1/1/stderr.log",
        (
            "run train-1124-093000-k3xq ended with exit code 1: rank 1 on local-0 ended with exit "
            "code 1: ValueError: no (step 1,240, 1 restart, last checkpoint: step 1,200)"
        ),
        "logs: /logs",
        (
            "go on with: perdure resume train-1124-093000-k3xq; more: perdure why "
            "train-1124-093000-k3xq"
        ),
    ]


def test_a_fault_that_was_survived_is_no_root_cause_of_a_stop() -> None:
    stopped = {**FAILED, "exit_code": 130, "because": "stopped: SIGINT asked for it"}
    assert summary(RunView.read(stopped))[0].startswith("run train-1124-093000-k3xq ended with")


def test_the_last_words_on_a_success_and_on_a_detach() -> None:
    done = {**RUNNING, "phase": "finished", "exit_code": 0, "because": "every rank has finished"}
    assert summary(RunView.read(done)) == [
        "run train-1124-093000-k3xq finished (step 1,240, 1 restart, last checkpoint: step 1,200)"
    ]
    assert "goes on without this terminal" in summary(RunView.read(RUNNING))[0]


def test_json_lines_are_json_and_statuses_are_not_a_flood() -> None:
    out, now = io.StringIO(), [0.0]
    face = JsonLines(out, clock=lambda: now[0])
    for _ in range(5):
        face.turn(RUNNING, [])
    now[0] = 1.5
    face.turn(RUNNING, [launch("1.1", T, None), {"kind": "state", "core": {}}])
    face.end(FAILED)
    kinds = [json.loads(line)["kind"] for line in out.getvalue().splitlines()]
    assert kinds == ["status", "launch_gang", "status", "summary"]


def drawn(status: Json, width: int = 110) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(rows(RunView.read(status), T + 100.0))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_live_rows() -> None:
    title, progress, safety = drawn(RUNNING)
    assert title.startswith(" perdure train-1124-093000-k3xq  ──")
    assert progress.startswith("● running  attempt 1.2  step 1,240 / 5,000  ━━━")
    assert progress.endswith("24.8%  12.4 steps/s  5 min 03 s left  loss 2.314")
    assert safety == (
        "  1 node, 2 ranks · checkpoint step 1,200 in store, 12 s ago · 1 restart"
        "  last fault: rank 1 on local-0 was e…"
    )


def test_live_rows_are_three_whatever_comes() -> None:
    no_end = {**RUNNING, "total_steps": None, "loss": None, "checkpoint": None}
    waiting = {"run": "r", "phase": "waiting", "waiting_for": "1 of 2 nodes: " + "long " * 60}
    for status in (RUNNING, FAILED, no_end, waiting, {}):
        for width in (40, 80, 200):
            assert len(drawn(status, width)) == 3, (status, width)
    assert "no checkpoint yet" in drawn(no_end)[2]
    assert drawn(waiting)[1].startswith("● waiting  1 of 2 nodes: long")


def test_status_for_people() -> None:
    raw = {**RUNNING, "source": "journal", "alive": False, "at": T}
    assert told(RunView.read(raw), raw, T + 100.0) == [
        "run         train-1124-093000-k3xq",
        (
            "phase       running; its controller does not answer from here, "
            "its journal was written 1 min 40 s ago: it is dead, go on with `perdure resume "
            "train-1124-093000-k3xq`"
        ),
        "attempt     1.2, 1 restart",
        "progress    step 1,240 of 5,000 (24.8%), 12.4 steps/s, 5 min 03 s left, loss 2.314",
        "ranks       2 ranks on local-0",
        "checkpoint  step 1,200 in store, 12 s ago",
        told(RunView.read(raw), raw, T)[-1],
    ]


class Stuck:
    """A console that nobody reads: it blocks until it is let go."""

    def __init__(self) -> None:
        self.free, self.ended, self.lines = threading.Event(), threading.Event(), 0

    def turn(self, status: Json, lines: Sequence[Json]) -> None:
        assert self.free.wait(20), "the test lets it go"
        self.lines += len(lines)

    def idle(self) -> None:
        return

    def end(self, status: Json) -> None:
        self.ended.set()


def test_a_stopped_terminal_never_holds_the_driver() -> None:
    face = Stuck()
    display = Display(face)
    for number in range(200):  # each would block for ever if it were written in this thread
        display({"step": number}, [{"kind": "note", "at": T, "text": "x"}])
    face.free.set()
    display.close()
    assert face.ended.wait(20)
    assert face.lines == 200, "no line was lost"


def test_a_reader_that_went_away_ends_the_display_only() -> None:
    class Gone(Stuck):
        def turn(self, status: Json, lines: Sequence[Json]) -> None:
            raise BrokenPipeError

    display = Display(Gone())
    display(RUNNING, [{"kind": "note"}])
    display(RUNNING, [{"kind": "note"}])
    display.close()
