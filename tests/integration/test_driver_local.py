"""Jobs on this machine: real agents, real ranks, real kills. No network but loopback."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure.checkpoint.store import open_store
from perdure.launchers import records
from perdure.launchers.job import Job, run_local, submit
from perdure.runtime import journal, sweep
from perdure.runtime.errors import RunProblem
from perdure.runtime.opening import ResumeFrom
from perdure.runtime.spec import JobSpec, Timers

SCRIPT = """
import os, pathlib, sys, time
out = pathlib.Path(os.environ["OUT"])
rank, attempt = os.environ["RANK"], os.environ["PERDURE_ATTEMPT"]
with open(out / f"rank-{rank}.txt", "a") as file:
    for step in range(1, int(sys.argv[1]) + 1):
        file.write(f"{attempt} {step} {os.getpid()} {time.time()}\\n")
        file.flush()
        time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
"""


class Bench:
    """One job's folders, and what its ranks wrote."""

    def __init__(self, tmp_path: Path, run: str) -> None:
        self.path, self.run = tmp_path, run
        (tmp_path / "out").mkdir()
        (tmp_path / "step.py").write_text(SCRIPT)

    def spec(self, steps: int, pause_s: float = 0.02, exit_code: int = 0, **more: Any) -> JobSpec:
        words = (str(self.path / "step.py"), str(steps), str(pause_s), str(exit_code))
        return JobSpec(
            run=self.run,
            entry="script",
            argv=words,
            cwd=str(self.path),
            store=f"file://{self.path}/store/{self.run}",
            log_dir=str(self.path / "logs"),
            env={"OUT": str(self.path / "out")},
            code="none",
            warm=False,
            **more,
        )

    def steps(self, rank: int = 0) -> list[tuple[str, int, int, float]]:
        path = self.path / "out" / f"rank-{rank}.txt"
        rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(r[0], int(r[1]), int(r[2]), float(r[3])) for r in rows if len(r) == 4]

    def wait(self, good: Callable[[], Any], what: str, bound_s: float = 40.0) -> Any:
        end_s = time.monotonic() + bound_s
        while not (value := good()):
            assert time.monotonic() < end_s, f"{what}: not within {bound_s} s\n{self.story()}"
            time.sleep(0.01)
        return value

    def lines(self) -> list[dict[str, Any]]:
        return list(journal.read(open_store(f"file://{self.path}/store/{self.run}")).events())

    def story(self) -> str:
        log = self.path / "nodes" / self.run / "controller.log"
        words = [json.dumps(line)[:300] for line in self.lines()]
        return "\n".join([*words, log.read_text() if log.exists() else ""])

    def processes(self) -> list[int]:
        return sweep.marked(**{sweep.RUN_MARK: self.run}) + self.controllers()

    def controllers(self, role: str = "") -> list[int]:
        """Detached controller and guard: known by their command line."""
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
                if words[-2:-1] == [self.run.encode()] and words[-3].startswith(role.encode()):
                    found.append(int(name))
        return [pid for pid in found if sweep.alive(pid)]


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Bench]:
    monkeypatch.setenv("PERDURE_HOME", str(tmp_path))
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[-40:].strip("-")
    made = Bench(tmp_path, f"{name}-{os.getpid()}")
    yield made
    with contextlib.suppress(AssertionError):
        made.wait(lambda: not made.processes(), "the end", 10.0)
    left = made.processes()
    sweep.kill(left)
    assert left == [], made.story()


def observe(status: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Nobody looks."""


def test_a_job_ends_with_its_script(bench: Bench) -> None:
    assert run_local(bench.spec(3, nproc_per_node=2), {}, observe) == 0
    assert [row[1] for row in bench.steps(0)] == [1, 2, 3]
    assert [row[1] for row in bench.steps(1)] == [1, 2, 3]
    record = records.read(bench.run)
    assert record is not None and record.pid == os.getpid()


def test_a_script_that_fails_ends_with_its_own_code(bench: Bench) -> None:
    seen: list[dict[str, Any]] = []
    code = run_local(
        bench.spec(2, exit_code=7, max_restarts=1), {}, lambda status, lines: seen.append(status)
    )
    assert code == 7
    assert seen[-1]["restarts"] == 1 and seen[-1]["root_cause"]["exit_code"] == 7


def test_a_killed_rank_is_back_at_once(bench: Bench) -> None:
    killed: list[float] = []

    def kill_once(status: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        rows = bench.steps(1)
        if len(rows) >= 3 and not killed:
            killed.append(time.time())
            os.kill(rows[-1][2], signal.SIGKILL)

    assert run_local(bench.spec(40, 0.05, nproc_per_node=2), {}, kill_once) == 0
    assert killed, "the fault was never injected"
    again = [row for row in bench.steps(1) if row[0] == "1.2"]
    assert len(again) == 40
    lines = [line for line in bench.lines() if line["kind"] in ("rank_exited", "launch_gang")]
    exit_at = next(line["at"] for line in lines if line["kind"] == "rank_exited")
    launch_at = [line["at"] for line in lines if line["kind"] == "launch_gang"][1]
    print(
        f"exit seen {exit_at - killed[0]:.3f} s, launch {launch_at - killed[0]:.3f} s, "
        f"first step {again[0][3] - killed[0]:.3f} s after the kill"
    )
    assert launch_at > exit_at > killed[0]


def test_a_killed_node_goes_on_on_the_spare(bench: Bench) -> None:
    killed: list[str] = []

    def kill_once(status: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        if len(bench.steps(1)) >= 3 and not killed:
            killed.append(status["nodes"][1])
            sweep.kill(sweep.marked(**{sweep.RUN_MARK: bench.run, sweep.NODE_MARK: killed[0]}))

    spec = bench.spec(40, 0.05, nnodes=2, spares=1)
    assert run_local(spec, {}, kill_once, nodes=3) == 0
    assert killed, "the fault was never injected"
    second = [line for line in bench.lines() if line["kind"] == "launch_gang"][1]
    assert killed[0] not in [member[0] for member in second["members"]]
    assert len([row for row in bench.steps(1) if row[0] == "1.2"]) == 40


def test_an_agent_that_dies_is_started_again(bench: Bench) -> None:
    killed: list[int] = []

    def kill_once(status: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        if len(bench.steps()) >= 3 and not killed:
            pids = sweep.marked(**{sweep.RUN_MARK: bench.run})
            killed.extend(pids)
            sweep.kill(pids)

    assert run_local(bench.spec(30, 0.05), {}, kill_once) == 0
    assert killed, "the fault was never injected"
    assert [row[1] for row in bench.steps() if row[0] == "1.2"] == list(range(1, 31))


def test_more_nodes_than_there_are_wait_in_words_and_end_with_75(bench: Bench) -> None:
    seen: list[str] = []
    spec = bench.spec(1, nnodes=2, timers=Timers(place_s=2.0))
    code = run_local(spec, {}, lambda status, lines: seen.append(status["waiting_for"]))
    assert code == 75
    assert any("1 of 2 nodes" in words for words in seen)
    assert bench.steps() == []


def pids_of(bench: Bench, ranks: int) -> set[int]:
    return {bench.steps(rank)[-1][2] for rank in range(ranks)}


# A controller needs seconds to come back on a machine that is busy; a fence is not what is tested.
PATIENT = Timers(fence_s=40.0, takeover_s=60.0)


def submitted(bench: Bench, steps: int, pause_s: float = 0.05, **more: Any) -> Job:
    job = submit(bench.spec(steps, pause_s, nproc_per_node=2, timers=PATIENT, **more))
    bench.wait(lambda: bench.controllers("guard"), "the guard")
    bench.wait(lambda: bench.steps(0) and bench.steps(1), "the first steps")
    bench.wait(lambda: "gang_started" in str(bench.lines()), "the journal to follow")
    return job


def kill_controller(bench: Bench) -> int:
    record = records.read(bench.run)
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    return record.pid


def test_a_submitted_job_outlives_its_submitter(bench: Bench) -> None:
    job = submitted(bench, 20)
    assert job.status()["phase"] in ("launching", "running")
    assert job.wait(60.0) == 0
    assert job.status()["exit_code"] == 0
    assert "launch_gang" in [line["kind"] for line in job.events()]


def test_a_killed_controller_is_replaced_and_no_rank_notices(bench: Bench) -> None:
    job = submitted(bench, 80)
    before = pids_of(bench, 2)
    old = kill_controller(bench)
    fresh = bench.wait(
        lambda: (r := records.read(bench.run)) and r.pid != old and r.pid, "a new controller"
    )
    assert fresh in bench.controllers()
    assert job.wait(60.0) == 0
    kinds = [line["kind"] for line in bench.lines()]
    assert kinds.count("launch_gang") == 1 and "took_over" in kinds
    assert pids_of(bench, 2) == before
    assert [row[1] for row in bench.steps(0)] == list(range(1, 81))


def test_a_controller_killed_in_a_recovery_is_followed_by_one_that_finishes_it(
    bench: Bench,
) -> None:
    job = submitted(bench, 60, 0.05)
    chance = random.Random(int(os.environ.get("SEED", "7")))
    for round_number in range(4):
        seen = len(bench.steps(0))
        delay_s = chance.uniform(0.0, 0.03)
        print(f"round {round_number}: controller killed {delay_s * 1000:.1f} ms after the rank")
        os.kill(bench.steps(0)[-1][2], signal.SIGKILL)
        time.sleep(delay_s)
        old = kill_controller(bench)
        bench.wait(
            lambda old=old: (r := records.read(bench.run)) and r.pid != old, "a new controller"
        )
        bench.wait(lambda seen=seen: len(bench.steps(0)) > seen + 2, "steps after the recovery")
    assert job.wait(60.0) == 0
    rows = bench.steps(0)
    last = rows[-1][0]
    assert [row[1] for row in rows if row[0] == last] == list(range(1, 61))
    attempts = list(dict.fromkeys(row[0] for row in rows))
    numbers = [tuple(map(int, attempt.split("."))) for attempt in attempts]
    assert numbers == sorted(numbers), "attempts never go back"


def test_controller_and_guard_bring_each_other_back(bench: Bench) -> None:
    job = submitted(bench, 80)
    (guard,) = bench.wait(lambda: bench.controllers("guard"), "the guard")
    os.kill(guard, signal.SIGKILL)
    bench.wait(lambda: (pids := bench.controllers("guard")) and pids != [guard], "another guard")
    old = kill_controller(bench)
    bench.wait(lambda: (r := records.read(bench.run)) and r.pid != old, "another controller")
    assert job.wait(60.0) == 0
    assert [line["kind"] for line in bench.lines()].count("launch_gang") == 1


def test_a_controller_killed_before_its_first_words(bench: Bench) -> None:
    """The gang was launched, and the journal does not know of it yet."""
    job = submit(bench.spec(60, 0.05, timers=PATIENT))
    bench.wait(lambda: bench.steps(0), "the first step")
    old = kill_controller(bench)
    before = pids_of(bench, 1)
    bench.wait(lambda: (r := records.read(bench.run)) and r.pid != old, "another controller")
    assert job.wait(60.0) == 0
    assert pids_of(bench, 1) == before, bench.story()


def test_a_stop_from_elsewhere(bench: Bench) -> None:
    job = submitted(bench, 2000)
    job.stop()
    assert job.wait(40.0) == 0
    assert len(bench.steps(0)) < 2000


def test_a_living_run_is_not_resumed_but_may_be_taken_over(bench: Bench) -> None:
    submitted(bench, 400)
    before = pids_of(bench, 2)
    old = set(bench.controllers())
    told: list[str] = []
    with pytest.raises(RunProblem, match="still alive") as caught:
        run_local(bench.spec(3), {}, observe, resume=ResumeFrom(on_wait=told.append))
    assert "--takeover" in caught.value.hint and told
    assert all(map(sweep.alive, before | old)), "it was only asked"
    assert run_local(bench.spec(3), {}, observe, resume=ResumeFrom(takeover=True)) == 0
    assert not any(map(sweep.alive, before | old))
    assert [row[1] for row in bench.steps(0) if row[0] == "2.2"] == [1, 2, 3]


LAUNCH = """
import sys
from perdure.launchers.job import run_local
from perdure.runtime.spec import JobSpec
sys.exit(run_local(JobSpec.from_json(sys.stdin.read()), {}, lambda status, lines: None))
"""


def test_a_killed_launcher_leaves_nothing_and_its_run_is_resumed(bench: Bench) -> None:
    spec = bench.spec(2000, nproc_per_node=2)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH], stdin=subprocess.PIPE)
    assert launcher.stdin is not None
    with launcher.stdin as stdin:
        stdin.write(spec.to_json().encode())
    bench.wait(lambda: bench.steps(0) and bench.steps(1), "the first steps")
    launcher.kill()
    launcher.wait()
    killed_s = time.monotonic()
    bench.wait(lambda: not bench.processes(), "nothing is left", 10.0)
    print(f"nothing left {time.monotonic() - killed_s:.2f} s after the launcher was killed")
    (bench.path / "out" / "rank-0.txt").unlink()
    told: list[str] = []
    assert run_local(bench.spec(3), {}, observe, resume=ResumeFrom(on_wait=told.append)) == 0
    assert told == [], "a controller that is seen to be dead is not waited for"
    assert {row[0] for row in bench.steps(0)} == {"2.2"}


def test_a_frozen_node_is_taken_over_and_wakes_to_nothing(bench: Bench) -> None:
    """Silence, not death: the spare takes the place, and the sleeper's ranks never step on."""
    timers = Timers(beat_s=0.3, fence_s=1.2, takeover_s=2.0, orphan_grace_s=60.0)
    job = submit(bench.spec(150, 0.05, nnodes=2, spares=1, timers=timers), nodes=3)
    bench.wait(lambda: len(bench.steps(1)) >= 3, "the first steps")
    node = job.status()["nodes"][1]
    frozen = sweep.marked(**{sweep.RUN_MARK: bench.run, sweep.NODE_MARK: node})
    frozen_at = time.time()
    sweep.kill(frozen, signal.SIGSTOP)
    try:
        rows = bench.wait(
            lambda: [row for row in bench.steps(1) if row[0] == "1.2"], "steps on the spare", 20.0
        )
    finally:
        woken_at = time.time()
        sweep.kill(frozen, signal.SIGCONT)
    took_s = rows[0][3] - frozen_at
    print(f"frozen to the next step: {took_s:.2f} s with takeover_s {timers.takeover_s}")
    assert took_s > timers.fence_s, "its own fence must have fallen before"
    bench.wait(lambda: not any(map(sweep.alive, frozen_ranks(frozen))), "the sleeper's ranks", 5.0)
    # This script has no optimizer whose hook could stop it before its next step: the agent does.
    late = [row for row in bench.steps(1) if row[0] == "1.1" and row[3] > woken_at + 1.0]
    assert late == []
    assert job.wait(60.0) == 0
    fault = job.status()["faults"][0]
    assert (fault["kind"], fault["node"]) == ("node_silent", node)


def frozen_ranks(pids: list[int]) -> list[int]:
    """Those of `pids` that ran the script."""
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"step.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found
