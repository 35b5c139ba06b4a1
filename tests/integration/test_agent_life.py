"""Real agents, real ranks, real kills: what an agent reports, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from perdure.runtime import sweep

STEPS = """
import os, subprocess, sys, time
import torch
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
for step in range(int(sys.argv[1])):
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    time.sleep(0.01)
"""
GLOO = "import torch.distributed as dist\ndist.init_process_group('gloo')\n" + STEPS
STUBBORN = (
    """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# A child in a session of its own, and an orphan of an orphan: what a process group would miss.
subprocess.Popen(["setsid", "sleep", "300"])
subprocess.Popen(["sh", "-c", "setsid sh -c 'sleep 301 & sleep 302' & exit 0"]).wait()
"""
    + STEPS
)


def write(folder: Path, text: str) -> Path:
    path = folder / "train.py"
    path.write_text(text)
    return path


def gone(pid: int, within_s: float) -> bool:
    end_s = time.monotonic() + within_s
    while sweep.alive(pid):
        if time.monotonic() > end_s:
            return False
        time.sleep(0.005)
    return True


def helpers_of(node: str = "n0") -> list[int]:
    return [
        pid
        for pid in sweep.marked(PERDURE_RUN="agent-test", PERDURE_NODE=node, **own_mark())
        if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def own_mark() -> dict[str, str]:
    return {"LEAK_MARK": os.environ["LEAK_MARK"]}


def test_a_gang_runs_loses_a_rank_and_runs_again(nodes: Any, tmp_path: Path) -> None:
    control = nodes.control(nodes.start(slots=2))
    control.job(write(tmp_path, GLOO), "100000")
    first = control.started(1)
    assert first["cold"] is None
    control.step(3)
    os.kill(first["pids"]["1"], signal.SIGKILL)
    report = control.until("exited")["report"]
    assert (report["rank"], report["signal"], report["by_us"]) == (1, 9, False)
    control.send("stop", attempt="1.1", grace_s=0)
    control.until("stopped")
    assert gone(first["pids"]["0"], 0.0), "stopped was said while a rank lived"
    second = control.started(2)
    control.step(1)
    assert not set(second["pids"].values()) & set(first["pids"].values())
    assert Path(first["logs"]["0"]).parts[-3:] == ("agent-test", "attempt_0", "0")
    assert Path(second["logs"]["0"]).parts[-2] == "attempt_1"


def test_the_end_of_a_script_is_told(nodes: Any, tmp_path: Path) -> None:
    agent = nodes.start(slots=2)
    control = nodes.control(agent)
    control.job(write(tmp_path, GLOO + "print('the end of rank', dist.get_rank())\n"), "5")
    logs = control.started(1)["logs"]
    assert [r["exit_code"] for r in control.exits(2).values()] == [0, 0]
    assert (Path(logs["1"]) / "stdout.log").read_text() == "the end of rank 1\n"
    control.send("shutdown", because="the test is over")
    assert agent.process.wait(10) == 0


def test_an_error_is_told_with_its_place(nodes: Any, tmp_path: Path) -> None:
    script = write(tmp_path, "def main():\n    raise ValueError('no such data')\n\n\nmain()\n")
    control = nodes.control(nodes.start())
    control.job(script)
    control.launch(1)
    report = control.exits(1)[0]
    assert report["exit_code"] == 1
    assert report["error"] == "ValueError: no such data"
    assert report["where"] == "train.py:2 in main"
    assert report["traceback"].startswith("Traceback (most recent call last):\n")
    assert "perdure" not in report["traceback"]


def test_a_stop_takes_all_that_a_rank_started(nodes: Any, tmp_path: Path) -> None:
    control = nodes.control(nodes.start())
    control.job(write(tmp_path, STUBBORN), "100000")
    pids = control.started(1)["pids"]
    control.step(1)
    assert len(helpers_of()) >= 3, "the fault was not there: no helpers to sweep"
    control.send("stop", attempt="1.1", grace_s=0.3)
    asked_s = time.monotonic()
    control.until("stopped", within_s=5)
    assert time.monotonic() - asked_s >= 0.3, "it ignores SIGTERM, and has its grace"
    assert not sweep.alive(pids["0"])
    assert helpers_of() == []


def test_a_dead_rank_leaves_no_orphans(nodes: Any, tmp_path: Path) -> None:
    script = "import subprocess\nsubprocess.Popen(['sleep', '300'])\n" + STEPS
    control = nodes.control(nodes.start())
    control.job(write(tmp_path, script), "100000")
    pid = control.started(1)["pids"]["0"]
    control.step(1)
    (helper,) = helpers_of()
    os.kill(pid, signal.SIGKILL)
    control.until("exited")
    assert gone(helper, 2.0)


def test_sigterm_reaches_the_rank_and_its_grace_is_used(nodes: Any, tmp_path: Path) -> None:
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saving', flush=True), sys.exit(0)))\n"
        + STEPS
    )
    control = nodes.control(nodes.start())
    control.job(write(tmp_path, script), "100000")
    logs = control.started(1)["logs"]
    control.step(1)
    control.send("stop", attempt="1.1", grace_s=20)
    control.until("stopped", within_s=10)
    assert (Path(logs["0"]) / "stdout.log").read_text() == "saving\n"


@pytest.mark.parametrize("victim", ["warden", "agent", "both"])
def test_whoever_is_killed_the_rest_ends(nodes: Any, tmp_path: Path, victim: str) -> None:
    agent = nodes.start()
    control = nodes.control(agent)
    control.job(write(tmp_path, STEPS), "100000")
    rank = control.started(1)["pids"]["0"]
    control.step(1)
    warden_pid, agent_pid = agent.process.pid, agent.pid
    if victim in ("warden", "both"):
        os.kill(warden_pid, signal.SIGKILL)
    if victim in ("agent", "both"):
        os.kill(agent_pid, signal.SIGKILL)
    assert gone(rank, 5.0)
    assert gone(agent_pid, 5.0)
    assert agent.process.wait(5) != 0


def test_a_killed_agent_takes_what_its_ranks_started(nodes: Any, tmp_path: Path) -> None:
    agent = nodes.start()
    control = nodes.control(agent)
    control.job(write(tmp_path, STUBBORN), "100000")
    control.started(1)
    control.step(1)
    assert len(helpers_of()) >= 3
    os.kill(agent.pid, signal.SIGKILL)
    agent.process.wait(6)
    assert helpers_of() == []


def test_an_owner_that_dies_takes_all_with_it_in_five_seconds(nodes: Any, tmp_path: Path) -> None:
    agent = nodes.start(owned=True)
    control = nodes.control(agent)
    control.job(write(tmp_path, STUBBORN), "100000")
    control.started(1)
    control.step(1)
    begun_s = time.monotonic()
    agent.end_owner()
    assert agent.process.wait(6) == 0
    assert time.monotonic() - begun_s < 5
    assert sweep.marked(**own_mark()) == []


def test_ranks_outlive_the_zygote(nodes: Any, tmp_path: Path) -> None:
    agent = nodes.start()
    control = nodes.control(agent)
    control.job(write(tmp_path, STEPS), "100000")
    rank = control.started(1)["pids"]["0"]
    step = control.step(1)["ranks"]["0"]["step"]
    (zygote,) = [
        pid
        for pid in sweep.children(agent.pid)
        if Path(f"/proc/{pid}/comm").read_text() == "perdure-zygote\n"
    ]
    os.kill(zygote, signal.SIGKILL)
    assert "forked from died" in control.until("note")["text"]
    control.step(step + 20)
    assert sweep.alive(rank)
    control.send("stop", attempt="1.1", grace_s=0)
    control.until("stopped")
    assert control.started(2)["cold"] is None
    control.step(1)


def test_an_agent_ends_what_an_earlier_one_left(nodes: Any, tmp_path: Path) -> None:
    first = nodes.start()
    control = nodes.control(first)
    control.job(write(tmp_path, STUBBORN), "100000")
    control.started(1)
    control.step(1)
    for pid in (first.process.pid, first.pid):
        os.kill(pid, signal.SIGKILL)
    first.process.wait(5)
    assert helpers_of(), "the fault was not there: nothing outlived the first agent"
    second = nodes.control(nodes.start())
    assert "earlier agent" in second.until("note")["text"]
    assert helpers_of() == []
