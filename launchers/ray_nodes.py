"""Ray nodes on this machine: one for `--cluster ray` with none running, three for demo and tests.

Nodes are started by Ray's own command line, which is its public door; nothing here reaches into
Ray. A node of `LocalRay` is a session of its own and carries a mark in its environment, which
everything that runs on it inherits, ranks included. That makes "a node died" something that can be
done for real on one machine: `kill_node` kills all that has the mark or belongs to the session.
(Both are needed: Ray's own processes overwrite their environment when they set their title, and
agents live in sessions of their own.)

Never: a process killed that does not carry a mark of this very cluster nor is in its sessions.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from perdure.runtime.errors import NoPlace

MARK = "LOCAL_RAY_NODE"  # not PERDURE_* nor RAY_*: those do not reach the ranks

# Ray's default puts its workers, and so the ranks, at nice 15: below everything else on the host.
_ENV = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
_RAY = ("-m", "ray.scripts.scripts")
_HEAD = ("--head", "--include-dashboard=false")
_OBJECT_STORE_BYTES = 80_000_000  # Ray's own least is 75 MB; nothing of ours goes through it


class LocalRay:
    """A Ray cluster of several nodes on this machine, for as long as the `with` block lasts.

    `address` is what `--cluster` takes. The first node is the head: its death ends the cluster.
    `python` is what Ray's workers run in: that of this process, if none is given.
    """

    def __init__(self, nodes: int, cpus: int, *, python: str = sys.executable) -> None:
        self.names: tuple[str, ...] = ()
        self.address = ""
        self._nodes, self._cpus, self._python = nodes, cpus, python
        self._id = uuid.uuid4().hex[:12]
        self._temp = ""
        self._sessions: dict[str, int] = {}

    def __enter__(self) -> Self:
        # Ray puts sockets below it, and the path of a socket has at most 107 characters.
        self._temp = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        try:
            for _ in range(self._nodes):  # one by one: two beginners have been seen to collide
                self.add()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def add(self) -> str:
        """One node more; its name. Raises NoPlace when Ray cannot start it."""
        name = f"node-{len(self.names)}"
        self.names += (name,)
        if not self.address:
            _finish(self._begin(name, *_HEAD, "--port=0", f"--temp-dir={self._temp}"))
            self.address = (Path(self._temp) / "ray_current_cluster").read_text().strip()
        else:
            _finish(self._begin(name, f"--address={self.address}"))
        return name

    def pids(self, name: str) -> list[int]:
        """Every process of that node now, Ray's own and what runs on it."""
        return _belonging(f"{self._id}/{name}/", {self._sessions[name]})

    def kill_node(self, name: str) -> int:
        """SIGKILL to everything on the node; returns how many processes it was, when all are gone."""
        return _kill_all(f"{self._id}/{name}/", {self._sessions[name]})

    def stop(self) -> None:
        """Idempotent. Raises RuntimeError if something cannot be killed."""
        _kill_all(f"{self._id}/", set(self._sessions.values()))
        if self._temp:
            shutil.rmtree(self._temp, ignore_errors=True)  # logs of a dead process, maybe half made
            self._temp = ""

    def _begin(self, name: str, *options: str) -> subprocess.Popen[str]:
        started = _ray_start(
            self._python,
            {MARK: f"{self._id}/{name}/"},
            *options,
            f"--node-name={name}",
            f"--num-cpus={self._cpus}",
            "--num-gpus=0",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
        )
        self._sessions[name] = started.pid
        return started


def start_here() -> str:
    """Start a Ray cluster of this machine alone, which stays until `ray stop`; its address.

    Raises NoPlace when Ray cannot be started.
    """
    _finish(_ray_start(sys.executable, {}, *_HEAD))
    return Path("/tmp/ray/ray_current_cluster").read_text().strip()


def _ray_start(python: str, env: dict[str, str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (python, *_RAY, "start", *options, "--disable-usage-stats"),
        env={**os.environ, **_ENV, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C in a terminal is for us, not for the cluster
    )


def _finish(started: subprocess.Popen[str], timeout_s: float = 90.0) -> None:
    try:
        said, _ = started.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        started.kill()
        said, _ = started.communicate()
        said += f"\n(no answer within {timeout_s:.0f} s)"
    if started.returncode != 0:
        raise NoPlace(
            f"Ray could not be started on this machine: {said.strip()[-1500:]}",
            hint="see the words of `ray start` above; is another Ray running? `ray stop` ends it",
        )


def _belonging(prefix: str, sessions: set[int]) -> list[int]:
    """Living processes with a mark that begins so, or in one of the sessions."""
    wanted = f"{MARK}={prefix}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            stat = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            if stat[0] in "ZX":  # dead, waiting to be reaped
                continue
            marked = int(stat[3]) in sessions or any(
                item.startswith(wanted)
                for item in Path(entry.path, "environ").read_bytes().split(b"\0")
            )
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # gone meanwhile, or another user's: not ours
        if marked:
            found.append(int(entry.name))
    return found


def _kill_all(prefix: str, sessions: set[int], timeout_s: float = 20.0) -> int:
    killed: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while pids := _belonging(prefix, sessions):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {pids} cannot be killed")
        time.sleep(0.01)  # a killed process needs a moment to be gone
    return len(killed)
