"""What integration tests share: a real S3 server, and the proof that nothing of ours is left."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from perdure.launchers.ray_nodes import LocalRay
from perdure.runtime import sweep
from perdure.runtime.agent_start import StartedAgent, start_agent
from perdure.runtime.errors import WireError
from perdure.runtime.spec import JobSpec, Timers
from perdure.runtime.wire import Peer, dial

S3_START_S = 60.0
LEAK_MARK = "LEAK_MARK"  # inherited by all that a test starts; perdure passes it on like any other
GONE_S = 6.0


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test: no process that it started, and no shared memory with our name."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(LEAK_MARK, mark)
    yield
    end_s = time.monotonic() + GONE_S
    while left := sweep.marked(**{LEAK_MARK: mark}):
        if time.monotonic() > end_s:
            words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left}
            sweep.kill(left)
            pytest.fail(f"processes left behind: {words}")
        time.sleep(0.02)
    assert not [name for name in os.listdir("/dev/shm") if "perdure" in name]


class Controller:
    """A controller's part of the wire, for tests of an agent.

    A thread acknowledges beats, as a driver would whatever else it does; messages wait in a queue.
    """

    def __init__(self, agent: StartedAgent, term: int = 1) -> None:
        self.agent, self.term = agent, term
        self.acks, self.port = True, 0
        self.heard: list[dict[str, Any]] = []
        self._queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._peer: Peer = dial(agent.host, agent.port, agent.token, 5.0)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self.send("hello", run="agent-test")
        self.welcome = self.until("welcome")

    def _listen(self) -> None:
        while not self._closed.wait(0.002):
            try:
                with self._lock:
                    message = self._peer.receive(0.005)
                    if message and message["kind"] == "beat" and self.acks:
                        self._peer.send({"kind": "ack", "term": self.term, "seq": message["seq"]})
            except WireError:
                return
            if message is not None:
                self._queue.put(message)

    def send(self, kind: str, **fields: Any) -> None:
        with self._lock:
            self._peer.send({"kind": kind, "term": self.term, **fields})

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._peer.close()

    def until(
        self,
        kind: str,
        *,
        within_s: float = 30.0,
        where: Callable[[dict[str, Any]], bool] = lambda _message: True,
    ) -> dict[str, Any]:
        """The next message of `kind` that fits; those in between are kept in `heard`."""
        end_s = time.monotonic() + within_s
        while (left_s := end_s - time.monotonic()) > 0:
            try:
                message = self._queue.get(timeout=left_s)
            except queue.Empty:
                break
            self.heard.append(message)
            self.port = message.get("rendezvous_port", self.port)
            if message["kind"] == kind and where(message):
                return message
        told = [(m["kind"], m.get("text") or m.get("why")) for m in self.heard[-12:]]
        raise AssertionError(f"no {kind} within {within_s} s; heard {told}")

    def job(
        self, script: Path, *args: str, secrets: dict[str, str] | None = None, **fields: Any
    ) -> None:
        spec = {
            "run": "agent-test",
            "entry": "script",
            "argv": (str(script), *args),
            "cwd": str(script.parent),
            "store": f"file://{script.parent}/store/agent-test",
            "nproc_per_node": self.agent.slots,
            "code": "none",
            "redirects": "3",
        }
        raw = asdict(JobSpec(**{**spec, **fields}))
        self.send("job", spec=raw, secrets=secrets or {}, code=None, store_env={})
        self.until("ready")

    def launch(self, counter: int, *, nodes: tuple[str, ...] = ("n0",), **fields: Any) -> None:
        slots = self.agent.slots
        members = [[node, index, index * slots, slots] for index, node in enumerate(nodes)]
        message = {
            "attempt": f"{self.term}.{counter}",
            "members": members,
            "world_size": len(nodes) * slots,
            "master_addr": "127.0.0.1",
            "master_port": self.port,
            "restore": None,
            "restarts": counter - 1,
            "peers": [],
            "because": "a test",
        }
        self.send("launch", **{**message, **fields})

    def started(self, counter: int, **fields: Any) -> dict[str, Any]:
        self.launch(counter, **fields)
        return self.until("started")

    def step(self, at_least: int = 1, within_s: float = 30.0) -> dict[str, Any]:
        """A beat in which every rank has made that many steps."""

        def far(beat: dict[str, Any]) -> bool:
            ranks = beat["ranks"].values()
            return bool(ranks) and all(rank["step"] >= at_least for rank in ranks)

        return self.until("beat", where=far, within_s=within_s)

    def exits(self, count: int, within_s: float = 30.0) -> dict[int, dict[str, Any]]:
        reports: dict[int, dict[str, Any]] = {}
        while len(reports) < count:
            report = self.until("exited", within_s=within_s)["report"]
            reports[report["rank"]] = report
        return reports


@dataclass
class Nodes:
    """Makes agents and controllers for one test, and ends them after it."""

    folder: Path
    agents: list[StartedAgent]
    controllers: list[Controller]

    def start(self, node: str = "n0", *, slots: int = 1, **options: Any) -> StartedAgent:
        state = self.folder / f"state-{node}-{len(self.agents)}"
        agent = start_agent(
            run="agent-test", token="tok", node=node, slots=slots, state_dir=str(state), **options
        )
        self.agents.append(agent)
        return agent

    def control(self, agent: StartedAgent, term: int = 1) -> Controller:
        self.controllers.append(Controller(agent, term))
        return self.controllers[-1]

    def end(self) -> None:
        for controller in self.controllers:
            controller.close()
        for agent in self.agents:
            agent.end_owner()
            if agent.process.poll() is None:
                agent.process.terminate()
        for agent in self.agents:
            agent.process.wait(10)
            if agent.process.stdout is not None:
                agent.process.stdout.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path, [], [])
    try:
        yield made
    finally:
        made.end()


FAST = Timers(beat_s=0.2, fence_s=1.5, takeover_s=2.0, orphan_grace_s=6.0)


@pytest.fixture
def fast_timers() -> Timers:
    """The lease's law in seconds."""
    return FAST


@dataclass(frozen=True)
class S3Server:
    """moto's server in a process of its own: right answers over HTTP, no measure of speed."""

    endpoint: str
    _numbers: Iterator[int]

    @property
    def options(self) -> dict[str, str]:
        return {"key": "AKIDTEST", "secret": "moto-secret", "endpoint_url": self.endpoint}

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "AKIDTEST",
            "AWS_SECRET_ACCESS_KEY": "moto-secret",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def bucket(self) -> str:
        """A fresh, empty bucket as a URL: s3://bucket-N."""
        name = f"bucket-{next(self._numbers)}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        return f"s3://{name}"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One server for the session; a test takes a bucket of its own from it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("moto_server")),
        "-H",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + S3_START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, f"moto_server ended with {server.returncode}"
                assert time.monotonic() < deadline, "moto_server did not answer in time"
                time.sleep(0.05)
        yield S3Server(f"http://127.0.0.1:{port}", itertools.count(1))
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[LocalRay]:
    """Ray nodes of two processors: three for a gang and its spare, one for the test that kills one."""
    import ray

    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(LEAK_MARK, raising=False)  # it outlives the test that happens to need it
            nodes = stack.enter_context(LocalRay(4, cpus=2))
        yield nodes
        ray.shutdown()
