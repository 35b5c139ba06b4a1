"""This machine as a cluster: the default of `perdure run`, without a daemon.

One node, `local-0`; tests ask for more, each with a warden and an agent of its own, so that all but
the network is as on several machines. An agent that dies is reported lost and started again. In a
`run` the agents are owned: a pipe ends them when the launcher dies, however it dies. In a `submit`
they outlive the controller; who they are is written beside their state, and the next controller
finds them there. Whatever else carries this run's mark is a leftover and is ended before a start.

`early_start` is the first act of `perdure run`: the agent imports torch while options, store and
script are judged. So this module must stay cheap to import.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from perdure.launchers.records import home
from perdure.runtime import sweep
from perdure.runtime.agent_start import StartedAgent, start_agent
from perdure.runtime.cluster import AgentEndpoint, ClusterView
from perdure.runtime.errors import NoPlace

HOST = "127.0.0.1"
CLOSE_S = 10.0
CONTROLLER_MARK = "PERDURE_CONTROLLER"  # of detached controllers and their guards; agents lack it
BEFORE_RESTART_S = (0.0, 0.2, 1.0, 5.0)  # by how often in a row an agent did not come up


def new_token() -> str:
    return os.urandom(32).hex()


def state_of(run: str) -> Path:
    """Where this machine keeps the state of a run's nodes and of its controller."""
    return Path(home(), "nodes", run)


def started_ticks(pid: int) -> int:
    """When `pid` was started, in the kernel's ticks; with the pid it names a process for good."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b") ")[2].split()[19])


def seconds_of(ticks: int) -> float:
    """Ticks since boot as seconds since the epoch, the same each time it is asked."""
    with open("/proc/stat", "rb") as file:
        boot = next(int(line.split()[1]) for line in file if line.startswith(b"btime"))
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def ticks_of(seconds: float) -> int:
    return round((seconds - seconds_of(0)) * os.sysconf("SC_CLK_TCK"))


def is_same(pid: int, ticks: int) -> bool:
    try:
        return started_ticks(pid) == ticks and sweep.alive(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass(slots=True)
class EarlyAgent:
    """An agent that was started before its job was known."""

    started: StartedAgent
    token: str = field(repr=False)

    def close(self) -> None:
        """End it: the job is not going to run."""
        self.started.end_owner()
        self.started.process.wait(CLOSE_S)
        if self.started.process.stdout is not None:
            self.started.process.stdout.close()


def early_start(*, run: str, slots: int, warm: bool = True) -> EarlyAgent:
    token = new_token()
    started = start_agent(
        run=run,
        token=token,
        node="local-0",
        slots=slots,
        state_dir=str(state_of(run) / "local-0"),
        owned=True,
        console=True,
        warm=warm,
    )
    return EarlyAgent(started, token)


@dataclass(slots=True)
class _Node:
    """One agent: a child of ours, or one that an earlier controller started."""

    name: str
    started: StartedAgent | None = None
    endpoint: AgentEndpoint | None = None
    warden: tuple[int, int] | None = None  # pid, ticks
    failures: int = 0
    start_at_s: float = 0.0

    def alive(self) -> bool:
        if self.started is not None:
            return self.started.process.poll() is None
        return self.warden is not None and is_same(*self.warden)


class LocalCluster:
    """`nodes`: how many this machine plays. `again`: agents of an earlier controller may live."""

    def __init__(
        self,
        run: str,
        *,
        slots: int,
        token: str,
        owned: bool,
        console: bool = False,
        warm: bool = True,
        nodes: int = 1,
        early: EarlyAgent | None = None,
        again: bool = False,
        adopt: bool = False,
    ) -> None:
        self._run, self._slots, self._token = run, slots, token
        self._owned, self._console, self._warm = owned, console, warm
        self._nodes = {f"local-{i}": _Node(f"local-{i}") for i in range(nodes)}
        self._dir = state_of(run)
        self._wanted: set[str] = set()
        self._lost: list[tuple[str, str]] = []
        self._asked = 0
        self._closed = False
        if early is not None:
            self._nodes["local-0"].started = early.started
        if adopt:
            self._adopt()
        if again:
            self._sweep_leftovers()

    def request(self, count: int, exclude: frozenset[str]) -> None:
        self._asked = count
        for name in exclude & self._nodes.keys():
            self._end(self._nodes[name], signal.SIGKILL)
        usable = [name for name in self._nodes if name not in exclude]
        self._wanted = set(usable[:count])
        self._start_missing()

    def poll(self) -> ClusterView:
        if not self._closed:
            for node in self._nodes.values():
                self._look(node)
            self._start_missing()
        endpoints = tuple(n.endpoint for n in self._nodes.values() if n.endpoint is not None)
        lost, self._lost = tuple(self._lost), []
        return ClusterView(agents=endpoints, lost=lost, waiting_for=self._waiting_for())

    def close(self) -> None:
        self._closed = True
        end_s = time.monotonic() + CLOSE_S
        for node in self._nodes.values():
            if node.started is not None:
                node.started.end_owner()
            self._signal(node, signal.SIGTERM)
        while any(node.alive() for node in self._nodes.values()) and time.monotonic() < end_s:
            time.sleep(0.01)
        for node in self._nodes.values():
            self._end(node, signal.SIGKILL)
        (self._dir / "agents.json").unlink(missing_ok=True)

    def _waiting_for(self) -> str:
        if self._asked > len(self._nodes):
            return (
                f"{len(self._nodes)} of {self._asked} nodes: this machine is one node; "
                "`--cluster ray` has more"
            )
        tired = [node.name for node in self._nodes.values() if node.failures > 1]
        if tired:
            return f"{', '.join(tired)}: its agent does not come up; see {self._dir}/NODE/agent.log"
        return ""

    def _start_missing(self) -> None:
        for name in sorted(self._wanted):
            node = self._nodes[name]
            if node.started is None and node.warden is None and node.start_at_s <= time.monotonic():
                node.started = start_agent(
                    run=self._run,
                    token=self._token,
                    node=name,
                    slots=self._slots,
                    host=HOST,
                    state_dir=str(self._dir / name),
                    owned=self._owned,
                    console=self._console,
                    warm=self._warm,
                )

    def _look(self, node: _Node) -> None:
        """What became of a node since the last look."""
        if node.started is not None and node.endpoint is None and self._answered(node):
            endpoint = AgentEndpoint(
                node=node.name,
                host=HOST,
                port=node.started.port,
                slots=self._slots,
                token=self._token,
            )
            node.endpoint, node.failures = endpoint, 0
            pid = node.started.process.pid
            node.warden = (pid, started_ticks(pid))
            self._write()
        if (node.started is not None or node.warden is not None) and not node.alive():
            code = node.started.process.returncode if node.started is not None else None
            if node.endpoint is not None:
                words = "its warden ended" + (f" with {code}" if code is not None else "")
                self._lost.append((node.name, words))
            self._failed(node)

    def _answered(self, node: _Node) -> bool:
        started = node.started
        assert started is not None
        stdout = started.process.stdout
        if stdout is None or not (stdout.closed or select.select([stdout], [], [], 0)[0]):
            return False
        try:
            started.wait_ready(1.0)
        except NoPlace:  # `alive()` sees its end, and it is started again
            return False
        return True

    def _failed(self, node: _Node) -> None:
        self._end(node, signal.SIGKILL)
        pause_s = BEFORE_RESTART_S[min(node.failures, len(BEFORE_RESTART_S) - 1)]
        node.start_at_s = time.monotonic() + pause_s
        node.failures += 1

    def _end(self, node: _Node, how: signal.Signals) -> None:
        """Nothing of this node is left, and nothing of it is known."""
        self._signal(node, how)
        if node.started is not None:
            node.started.end_owner()
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.started.process.wait(1.0)
            if node.started.process.stdout is not None:
                node.started.process.stdout.close()
        if node.started is not None or node.warden is not None:
            sweep.kill_marked(**{sweep.RUN_MARK: self._run, sweep.NODE_MARK: node.name})
        node.started = node.warden = node.endpoint = None

    def _signal(self, node: _Node, how: signal.Signals) -> None:
        if node.started is not None:
            if node.started.process.poll() is None:
                node.started.process.send_signal(how)
        elif node.warden is not None and is_same(*node.warden):
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.warden[0], how)

    def _sweep_leftovers(self) -> None:
        for node in self._nodes.values():
            if node.started is None and node.warden is None:
                sweep.kill_marked(**{sweep.RUN_MARK: self._run, sweep.NODE_MARK: node.name})

    def _write(self) -> None:
        agents = [
            [node.name, node.endpoint.port, *node.warden]
            for node in self._nodes.values()
            if node.endpoint is not None and node.warden is not None
        ]
        path = self._dir / "agents.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(agents))
        fresh.replace(path)

    def _adopt(self) -> None:
        path = self._dir / "agents.json"
        if not path.exists():
            return
        for name, port, pid, ticks in json.loads(path.read_text()):
            if name in self._nodes and is_same(pid, ticks):
                node = self._nodes[name]
                node.warden = (pid, ticks)
                node.endpoint = AgentEndpoint(
                    node=name, host=HOST, port=port, slots=self._slots, token=self._token
                )
                self._wanted.add(name)
