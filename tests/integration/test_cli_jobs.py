"""The command line against real jobs on this machine: exit codes, recovery, stops, what is told.

Most scripts here import no torch: what is tested is the launcher, and a rank that starts in
milliseconds leaves time for more of it. `marked` finds every process of a run by its mark, so that
each test ends with the proof that none is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PERDURE = str(Path(sys.executable).with_name("perdure"))
WAIT_S = 60.0


@dataclass
class Shell:
    """`perdure` in a folder and a home of its own."""

    folder: Path
    environ: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [PERDURE, *words],
            cwd=self.folder,
            env=self.environ,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def __call__(self, *words: str, code: int = 0) -> tuple[str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=WAIT_S)
        assert process.returncode == code, f"{words}: {process.returncode}\n{out}\n{err}"
        return out, err

    def script(self, text: str, name: str = "train.py") -> str:
        (self.folder / name).write_text(text)
        return name

    def wait_for(self, name: str) -> str:
        """The text of a file that a rank writes."""
        path = self.folder / name
        return until(lambda: path.read_text() if path.exists() else "", f"{name} is written")

    def wait_for_phase(self, phase: str) -> None:
        def look() -> str:
            now = json.loads(self("status", "--json", "t-run")[0])["phase"]
            return str(now) if now == phase else ""

        until(look, f"the run is {phase}")


def until(look: Callable[[], str], what: str) -> str:
    end = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < end, f"waited {WAIT_S:.0f} s for: {what}"
        time.sleep(0.02)
    return found


def marked(run: str) -> list[int]:
    """Processes of this run, by the mark in their environment."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                environ = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            if f"PERDURE_RUN={run}".encode() in environ:
                found.append(int(entry))
    return found


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PERDURE", "PET_", "AWS_"))}
    made = Shell(tmp_path, {**environ, "PERDURE_HOME": str(tmp_path / "home")})
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
            process.wait(10)
    until(lambda: "" if marked("t-run") else "none", "no process of the run is left")


RUN = ("run", "--name", "t-run")
COLD = (*RUN, "--no-warm")  # no torch is imported: for what has nothing to do with starts
KILLED_ONCE = """
import os, signal
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    open("fired", "w").write("yes")
    os.kill(os.getpid(), signal.SIGKILL)
print("rank", os.environ["RANK"], "of attempt", os.environ["PERDURE_ATTEMPT"])
"""
ENDLESS = """
import os, signal, sys, time
open("rank" + os.environ["RANK"], "w").write(str(os.getpid()))
print("here I am", flush=True)
for _ in range(3000):
    time.sleep(0.02)
"""


def test_a_job_that_ends_well(shell: Shell) -> None:
    script = shell.script("import sys, os; print('args', sys.argv[1:], os.environ['COLOUR'])")
    out, err = shell(*RUN, "--env", "COLOUR=red", script, "--lr", "1")
    assert out == "args ['--lr', '1'] red\n", "stdout is the script's alone"
    assert "attempt 1.1: start with 1 rank" in err
    assert "run t-run finished" in err
    told = json.loads(shell("status", "--json", "t-run")[0])
    assert (told["run"], told["phase"], told["exit_code"]) == ("t-run", "finished", 0)
    assert "t-run  finished (exit code 0)" in shell("status")[0]
    assert shell("logs", "t-run")[0] == out
    assert "no fault was seen" in shell("why", "t-run")[0]


@pytest.mark.parametrize(("statement", "code"), [("sys.exit(7)", 7), ("1 / 0", 1)])
def test_the_script_s_own_exit_code(shell: Shell, statement: str, code: int) -> None:
    script = shell.script(f"import sys\n{statement}\n")
    _, err = shell(*COLD, "--max-restarts", "0", script, code=code)
    assert f"run t-run ended with exit code {code}" in err
    if code == 1:
        assert "root cause: rank 0" in err
        assert "ZeroDivisionError" in err
        assert "line 2, in <module>" in err
        log = next(line for line in err.splitlines() if "its log: " in line).split("its log: ")[1]
        assert "ZeroDivisionError" in Path(log).read_text()


def test_the_same_error_again_and_again_is_not_restarted_for_ever(shell: Shell) -> None:
    script = shell.script("raise ValueError('no such column: price')\n")
    _, err = shell(*COLD, script, code=93)
    assert "3 attempts in a row made no progress" in err
    assert "ValueError: no such column: price" in err


def test_a_killed_rank_comes_back_and_why_tells(shell: Shell) -> None:
    out, err = shell(*RUN, "--nproc-per-node", "2", shell.script(KILLED_ONCE))
    assert shell.wait_for("fired") == "yes"
    assert sorted(line for line in out.splitlines() if "1.2" in line) == [
        "rank 0 of attempt 1.2",
        "rank 1 of attempt 1.2",
    ]
    assert "fault: rank 1 on " in err
    assert "SIGKILL" in err
    why = shell("why", "t-run")[0]
    assert "was ended by SIGKILL" in why
    assert "attempt 1.2 on " in why
    (fault,) = json.loads(shell("why", "--json", "t-run")[0])["faults"]
    assert (fault["rank"], fault["attempt"], fault["next_attempt"]) == (1, "1.1", "1.2")
    assert 0 < fault["took_s"] < 30
    lines = [json.loads(line) for line in shell("events", "--json", "t-run")[0].splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds.count("launch_gang") == 2
    assert kinds[-1] == "finish"
    assert all({"at", "kind"} <= set(line) for line in lines)
    # the same story from the folder's URL, as from another machine
    url = f"file://{shell.folder}/home/store/t-run"
    assert shell("why", url)[0] == why.replace("t-run (file", "t-run (file")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_a_local_run(shell: Shell, number: signal.Signals, code: int) -> None:
    process = shell.start(*RUN, "--nproc-per-node", "2", shell.script(ENDLESS))
    pids = [int(shell.wait_for(f"rank{rank}")) for rank in (0, 1)]
    process.send_signal(number)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == code, err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert "perdure resume t-run" in err


def test_a_second_interrupt_waits_for_nothing(shell: Shell) -> None:
    stubborn = ENDLESS.replace("open(", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(", 1)
    process = shell.start(*COLD, shell.script(stubborn))
    shell.wait_for("rank0")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two interrupts at once are one to the kernel
    assert process.poll() is None, "the script ignores SIGTERM and has 30 s to leave"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert time.monotonic() - began < 20, "less than the grace"


def test_a_killed_launcher_leaves_nothing_and_resume_goes_on(shell: Shell) -> None:
    process = shell.start(*RUN, shell.script(ENDLESS))
    pid = int(shell.wait_for("rank0"))
    process.kill()
    process.communicate(timeout=WAIT_S)
    began = time.monotonic()
    until(lambda: "" if marked("t-run") else "none", "everything is gone")
    assert time.monotonic() - began < 20, "5 s on a machine that is not overloaded"
    assert not os.path.exists(f"/proc/{pid}")
    shell.script("print('on again')")
    out, _ = shell("resume", "t-run")
    assert "on again" in out


def test_submit_look_and_stop(shell: Shell) -> None:
    out, _ = shell("submit", "--name", "t-run", shell.script(ENDLESS))
    assert out == "t-run\n"
    shell.wait_for("rank0")
    shell.wait_for_phase("running")
    assert shell("logs", "t-run")[0] == "here I am\n"
    err = shell("resume", "t-run", code=2)[1]
    assert "is still alive: its controller answers" in err
    assert "perdure stop t-run" in err
    assert "is stopped" in shell("stop", "t-run")[0]
    assert "has ended already" in shell("stop", "t-run", code=2)[1]


SAVES = """
import time, torch, perdure
run = perdure.init(total_steps=100_000)
weight = torch.zeros(1000)
checkpointer = run.checkpointer()
restored = checkpointer.restore({"weight": weight})
begin = restored.step if restored else 0
print("from", begin, flush=True)
assert weight[0] == begin
for step in range(begin + 1, 100_000):
    weight += 1
    run.beat(step)
    if run.due(step):
        checkpointer.save(step, {"weight": weight})
    time.sleep(0.01)
"""


def test_a_save_on_order_is_what_resume_begins_from(shell: Shell) -> None:
    shell("submit", "--name", "t-run", "--save-every", "100000", shell.script(SAVES))
    shell.wait_for_phase("running")
    told = json.loads(shell("save", "--json", "t-run")[0])
    assert told["checkpoint"] > 0
    shell("stop", "--now", "t-run")
    process = shell.start("resume", "t-run")
    said = f"from {told['checkpoint']}\n"  # until the new attempt begins, the old one's are shown
    until(lambda: said if shell("logs", "t-run")[0] == said else "", "the resumed rank speaks")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 143


def test_what_is_refused_leaves_nothing(shell: Shell) -> None:
    good = shell.script("print('hello')")
    shell.script("def f(:\n", "bad.py")
    cases = [
        (("trian.py",), "did you mean train.py"),
        (("bad.py",), 'File "bad.py", line 1'),
        (("-m", "no.such.module"), "no module no.such.module"),
        (("--no-python", "./go"), "no program ./go"),
        (("--store", "s3://bucket/x", "--env", "NOPE_NOPE", good), "NOPE_NOPE"),
    ]
    for words, said in cases:
        out, err = shell(*COLD, *words, code=2)
        assert said in err
        assert out == ""
        assert "Traceback" not in err
    assert not (shell.folder / "home" / "store" / "t-run").exists()
    assert not marked("t-run")
    shell(*COLD, good)
    assert "exists already" in shell(*COLD, good, code=2)[1]


def test_stores_that_cannot_be_used_are_found_before_a_rank_starts(shell: Shell) -> None:
    script = shell.script("open('started', 'w')")
    shell.environ.update(
        AWS_ACCESS_KEY_ID="AKIDTEST",
        AWS_SECRET_ACCESS_KEY="very-secret",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",  # the discard port: nobody listens
        AWS_REGION="us-east-1",
    )
    _, err = shell(*COLD, "--store", "s3://nowhere/runs", script, code=2)
    assert "127.0.0.1:9" in err or "s3://nowhere" in err
    assert "what to do: " in err
    assert "very-secret" not in err
    assert not (shell.folder / "started").exists()


def test_a_bucket_that_is_missing(shell: Shell, s3: Any) -> None:
    shell.environ.update(s3.environment)
    script = shell.script("open('started', 'w')")
    _, err = shell(*COLD, "--store", "s3://no-such-bucket/runs", script, code=2)
    assert "no-such-bucket" in err
    assert "ucket" in err.split("what to do: ")[1]
    assert not (shell.folder / "started").exists()


def test_a_run_kept_in_a_bucket(shell: Shell, s3: Any) -> None:
    shell.environ.update(s3.environment)
    bucket = s3.bucket()
    shell(*COLD, "--store", bucket, shell.script("print('x')"))
    assert "finished" in shell("status", f"{bucket}/t-run")[0]
    for path in (shell.folder / "home").rglob("*"):
        if path.is_file():
            assert b"moto-secret" not in path.read_bytes(), f"{path} holds a credential"


def test_json_is_one_object_a_line(shell: Shell) -> None:
    out, _ = shell(*COLD, "--json", shell.script("print('x')"))
    told = [json.loads(line) for line in out.splitlines()]
    assert told[-1]["kind"] == "summary"
    assert told[-1]["exit_code"] == 0
    assert "launch_gang" in {line["kind"] for line in told}
