"""Whom an agent obeys, for how long, and that everything may be said twice."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from perdure.runtime import sweep
from perdure.runtime.errors import WireError
from perdure.runtime.spec import Timers
from perdure.runtime.wire import dial

TRAIN = """
import os, sys, time
import torch
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
while True:
    optimizer.step()
    time.sleep(0.005)
"""
SESSION = """
import os, time
import perdure
import torch
run = perdure.init(total_steps=500)
optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
for step in range(101, 501):
    optimizer.step()
    run.beat(step, loss=torch.tensor(1.0 / step))
    if run.due(step):
        with run.phase("save"):
            print("due", step, flush=True)
    time.sleep(0.01)
"""


def write(folder: Path, text: str = TRAIN) -> Path:
    path = folder / "train.py"
    path.write_text(text)
    return path


def test_the_highest_term_is_obeyed_and_told_what_it_missed(nodes: Any, tmp_path: Path) -> None:
    agent = nodes.start()
    first = nodes.control(agent, term=1)
    first.job(write(tmp_path), secrets={"KEY": "value"})
    pid = first.started(1)["pids"]["0"]
    first.step(1)
    first.close()
    os.kill(pid, signal.SIGKILL)

    second = nodes.control(agent, term=3)
    assert second.welcome["attempt"] == "1.1"
    assert second.welcome["members"] == [["n0", 0, 0, 1]]
    assert second.welcome["secrets"] == {"KEY": "value"}
    assert second.exits(1)[0]["signal"] == 9
    assert not second.welcome["running"] or second.heard

    stale = dial(agent.host, agent.port, agent.token, 5)
    stale.send({"kind": "hello", "run": "agent-test", "term": 2})
    assert stale.receive(5) == {"kind": "refused", "term": 3}
    stale.send({"kind": "launch", "term": 2, "attempt": "2.9"})
    assert stale.receive(5) == {"kind": "refused", "term": 3}
    stale.send({"kind": "hello", "run": "agent-test", "term": 0})
    asked = stale.receive(5)
    assert asked is not None
    assert asked["kind"] == "welcome", "term 0 only asks, and is answered"
    stale.close()
    second.send("stop", attempt="1.1", grace_s=0)
    second.until("stopped")


def test_living_ranks_are_adopted_not_restarted(nodes: Any, tmp_path: Path) -> None:
    agent = nodes.start()
    first = nodes.control(agent, term=1)
    first.job(write(tmp_path))
    pid = first.started(1)["pids"]["0"]
    step = first.step(1)["ranks"]["0"]["step"]
    first.close()
    second = nodes.control(agent, term=2)
    assert second.welcome["running"]
    second.step(step + 10)
    assert sweep.alive(pid)


def test_a_peer_without_the_token_is_not_heard(nodes: Any) -> None:
    agent = nodes.start()
    with pytest.raises(WireError):
        dial(agent.host, agent.port, "another token", 5.0)
    nodes.control(agent)


def test_commands_may_be_said_twice(nodes: Any, tmp_path: Path) -> None:
    control = nodes.control(nodes.start())
    control.job(write(tmp_path))
    control.job(write(tmp_path))
    pids = control.started(1)["pids"]
    assert control.started(1)["pids"] == pids, "the same launch twice starts nothing twice"
    control.step(1)
    for _ in range(2):
        control.send("stop", attempt="1.1", grace_s=0)
        assert control.until("stopped")["attempt"] == "1.1"
    control.launch(1)  # of an attempt that was stopped: dropped
    new = control.started(2)
    assert new["attempt"] == "1.2"
    control.send("stop", attempt="1.1", grace_s=0)
    assert control.until("stopped")["attempt"] == "1.1"
    control.step(1)
    assert sweep.alive(new["pids"]["0"]), "a late stop of an older attempt ends nothing newer"


def test_a_launch_ends_an_older_gang_first(nodes: Any, tmp_path: Path) -> None:
    control = nodes.control(nodes.start())
    control.job(write(tmp_path))
    old = control.started(1)["pids"]["0"]
    control.step(1)
    new = control.started(2)["pids"]["0"]
    assert not sweep.alive(old)
    assert sweep.alive(new)


def test_a_silent_controller_costs_a_lone_node_its_ranks_and_no_launch_is_obeyed_late(
    nodes: Any, tmp_path: Path, fast_timers: Timers
) -> None:
    control = nodes.control(nodes.start())
    control.job(write(tmp_path), timers=dataclasses.asdict(fast_timers))
    pid = control.started(1)["pids"]["0"]
    control.step(1)
    control.acks = False
    report = control.until("exited", within_s=15)["report"]
    assert report["by_us"]
    assert not sweep.alive(pid)
    control.launch(2)
    assert "lease" in control.until("failed", within_s=2)["why"]


def test_an_owned_agent_has_no_fence(nodes: Any, tmp_path: Path, fast_timers: Timers) -> None:
    control = nodes.control(nodes.start(owned=True))
    control.job(write(tmp_path), timers=dataclasses.asdict(fast_timers))
    pid = control.started(1)["pids"]["0"]
    control.step(1)
    control.acks = False
    end_s = time.monotonic() + 3 * fast_timers.fence_s
    while time.monotonic() < end_s:
        control.until("beat")
    assert sweep.alive(pid)


def test_an_agent_that_nobody_controls_leaves(
    nodes: Any, tmp_path: Path, fast_timers: Timers
) -> None:
    agent = nodes.start()
    control = nodes.control(agent)
    control.job(write(tmp_path), timers=dataclasses.asdict(fast_timers))
    control.close()
    assert agent.process.wait(fast_timers.orphan_grace_s + 5) == 0


def gang(nodes: Any, folder: Path, timers: Timers, peers: bool) -> list[Any]:
    agents = [nodes.start(f"n{index}") for index in range(3)]
    controls = [nodes.control(agent) for agent in agents]
    asked = [[a.node, a.host, a.port] for a in agents] if peers else []
    for control in controls:
        control.job(write(folder), timers=dataclasses.asdict(timers))
    for control in controls:
        control.started(1, nodes=("n0", "n1", "n2"), peers=asked, master_addr="127.0.0.1")
    for control in controls:
        control.step(1)
    return controls


def test_a_majority_trains_on_without_a_controller_but_not_for_ever(
    nodes: Any, tmp_path: Path
) -> None:
    timers = Timers(beat_s=0.3, fence_s=3.0, takeover_s=4.0, orphan_grace_s=10.0)
    controls = gang(nodes, tmp_path, timers, peers=True)
    ranks = [next(m for m in c.heard if m["kind"] == "started")["pids"] for c in controls]
    silent_s = time.monotonic()
    for control in controls:
        control.close()
    while time.monotonic() - silent_s < 1.6 * timers.fence_s:
        assert all(sweep.alive(pid) for pids in ranks for pid in pids.values())
        time.sleep(0.05)
    for control in controls:
        assert control.agent.process.wait(30) == 0
    assert not any(sweep.alive(pid) for pids in ranks for pid in pids.values())


def test_a_node_cut_off_from_its_gang_ends_its_ranks(nodes: Any, tmp_path: Path) -> None:
    timers = Timers(beat_s=0.2, fence_s=1.5, takeover_s=2.0, orphan_grace_s=60.0)
    controls = gang(nodes, tmp_path, timers, peers=False)
    pid = next(iter(next(m for m in controls[0].heard if m["kind"] == "started")["pids"].values()))
    controls[0].acks = False
    report = controls[0].until("exited", within_s=10)["report"]
    assert report["by_us"]
    assert not sweep.alive(pid)


def test_a_rank_that_wakes_after_its_fence_leaves_before_its_next_step(
    nodes: Any, tmp_path: Path, fast_timers: Timers
) -> None:
    agent = nodes.start()
    control = nodes.control(agent)
    control.job(write(tmp_path), timers=dataclasses.asdict(fast_timers))
    started = control.started(1)
    rank = started["pids"]["0"]
    control.step(1)
    os.kill(rank, signal.SIGSTOP)
    os.kill(agent.pid, signal.SIGSTOP)
    time.sleep(2 * fast_timers.fence_s)
    os.kill(rank, signal.SIGCONT)
    end_s = time.monotonic() + 5
    while sweep.alive(rank):
        assert time.monotonic() < end_s, "the rank trained on behind its fence"
        time.sleep(0.01)
    assert (
        b"leaves before its next step" in (Path(started["logs"]["0"]) / "stderr.log").read_bytes()
    )
    os.kill(agent.pid, signal.SIGCONT)
    assert control.until("exited")["report"]["exit_code"] == 76


def test_a_script_names_its_steps_and_is_asked_to_save(nodes: Any, tmp_path: Path) -> None:
    control = nodes.control(nodes.start(slots=2))
    control.job(write(tmp_path, SESSION), save_every_steps=100)
    logs = control.started(1)["logs"]
    seen = control.step(102)["ranks"]["1"]
    assert seen["uses_due"]
    assert seen["total"] == 500
    assert seen["loss"] == pytest.approx(1 / seen["step"], rel=0.1)
    assert seen["phase"] in ("train", "save")
    control.send("save", attempt="1.1", step=101)
    assert control.until("save_set")["too_late"]
    control.send("save", attempt="1.1", step=333)
    assert control.until("save_set") == {
        "kind": "save_set",
        "attempt": "1.1",
        "step": 333,
        "too_late": False,
    }
    control.exits(2, within_s=60)
    for rank in "01":
        said = (Path(logs[rank]) / "stdout.log").read_text().split("\n")
        assert said[:-1] == ["due 200", "due 300", "due 333", "due 400", "due 500"]


def test_the_console_of_a_local_run_shows_what_torchrun_would(nodes: Any, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import os, sys\nprint('to stdout', os.environ['RANK'])\n"
        "print('to stderr', file=sys.stderr)\nprint('asked', sys.stdin.readline())\n",
    )
    out, err = os.memfd_create("out"), os.memfd_create("err")
    read, write_end = os.pipe()
    os.write(write_end, b"an answer\n")
    os.close(write_end)
    saved = [os.dup(number) for number in (0, 1, 2)]
    try:
        for number, fd in enumerate((read, out, err)):
            os.dup2(fd, number)
        agent = nodes.start(owned=True, console=True)
    finally:
        for number, fd in enumerate(saved):
            os.dup2(fd, number)
            os.close(fd)
    control = nodes.control(agent)
    control.job(script, redirects="0", tee="2")
    control.started(1)
    control.exits(1)
    control.send("stop", attempt="1.1", grace_s=0)
    control.until("stopped")
    assert os.pread(out, 999, 0).decode() == "to stdout 0\nasked an answer\n\n"
    assert os.pread(err, 999, 0).decode() == "[default0]:to stderr\n"
    for fd in (out, err, read):
        os.close(fd)


def test_code_is_fetched_verified_and_run_from_its_folder(nodes: Any, tmp_path: Path) -> None:
    from perdure.launchers.codepack import pack

    source = tmp_path / "source"
    source.mkdir()
    (source / "helper.py").write_text("WORD = 'packed'\n")
    (source / "train.py").write_text("import helper, os\nprint(helper.WORD, os.getcwd())\n")
    package = pack(str(source))
    code = tmp_path / "store" / "agent-test" / package.key
    code.parent.mkdir(parents=True)
    code.write_bytes(package.data)
    control = nodes.control(nodes.start())
    raw = {
        "run": "agent-test",
        "entry": "script",
        "argv": ["train.py"],
        "cwd": "/nowhere",
        "store": f"file://{tmp_path}/store/agent-test",
        "code_sha256": package.sha256,
    }
    control.send("job", spec=raw, secrets={}, code=package.key, store_env={})
    control.until("ready")
    logs = control.started(1)["logs"]
    assert control.exits(1)[0]["exit_code"] == 0
    word, where = (Path(logs["0"]) / "stdout.log").read_text().split()
    assert word == "packed"
    assert package.sha256 in where

    code.write_bytes(package.data[:-1] + b"x")
    altered = nodes.control(nodes.start("n1"))
    altered.send("job", spec=raw, secrets={}, code=package.key, store_env={})
    assert "sha256" in altered.until("failed")["why"]
