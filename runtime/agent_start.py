"""Starting a node's warden and agent: what both clusters, and the tests, call.

The configuration goes through stdin, because the token is in it: argument lists and environments can
be read in /proc. The marks that a sweep looks for go into the environment, because everything that is
ever started below inherits it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from perdure.runtime import sweep
from perdure.runtime.errors import NoPlace
from perdure.runtime.zygote_link import bootstrap


@dataclass(slots=True)
class StartedAgent:
    """A warden's process, and where its agent listens once it does."""

    process: subprocess.Popen[bytes]
    node: str
    host: str
    slots: int
    token: str = field(repr=False)
    owner: int | None  # our end of the owner's pipe: closing it ends the node within 5 s
    _answer: dict[str, int] | None = None

    @property
    def port(self) -> int:
        return self.wait_ready()["port"]

    @property
    def pid(self) -> int:
        """Of the agent; `process` is the warden above it."""
        return self.wait_ready()["pid"]

    def wait_ready(self, timeout_s: float = 20.0) -> dict[str, int]:
        """The agent's one line. Raises NoPlace when it did not come up in time."""
        if self._answer is None:
            stdout = self.process.stdout
            assert stdout is not None
            line, end_s = b"", time.monotonic() + timeout_s
            while not line.endswith(b"\n"):
                left_s = end_s - time.monotonic()
                ready = left_s > 0 and select.select([stdout], [], [], left_s)[0]
                if not ready or not (part := os.read(stdout.fileno(), 4096)):
                    why = "ended" if ready else f"gave no sign of life in {timeout_s:.0f} s"
                    raise NoPlace(
                        f"the agent of node {self.node} {why} while starting",
                        hint="its words are on stderr, or in agent.log of the node's state folder",
                    )
                line += part
            self._answer = json.loads(line)
            stdout.close()
        return self._answer

    def end_owner(self) -> None:
        if self.owner is not None:
            os.close(self.owner)
            self.owner = None


def agent_argv(*, warm: bool, owner_fd: int | None) -> list[str]:
    arguments = f"warm={warm}, owner_fd={owner_fd}"
    return [sys.executable, "-u", "-c", bootstrap("warden", arguments)]


def start_agent(
    *,
    run: str,
    token: str,
    node: str,
    slots: int,
    state_dir: str,
    host: str = "127.0.0.1",
    owned: bool = False,
    console: bool = False,
    warm: bool = True,
    env: dict[str, str] | None = None,
    log_path: str | None = None,
) -> StartedAgent:
    """Start a node. Returns at once; `.port` waits for it to listen.

    owned: it ends when this process does. Otherwise it outlives this process. console: ranks read this
    process's stdin, and their output is shown on its stdout and stderr as torchrun would. Without
    `console`, words of warden and agent go to `log_path`, by default <state_dir>/agent.log.
    """
    Path(state_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
    owner_read, owner_write = os.pipe() if owned else (None, None)
    shown = [os.dup(number) for number in (0, 1, 2)] if console else []
    errors = None if console else _log(log_path or str(Path(state_dir, "agent.log")))
    passed = [*shown, *([] if owner_read is None else [owner_read])]
    process = subprocess.Popen(
        agent_argv(warm=warm, owner_fd=owner_read),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=_environment(env or dict(os.environ), run, node, slots),
        pass_fds=passed,
        start_new_session=True,
    )
    for fd in (*passed, *([] if errors is None else [errors])):
        os.close(fd)
    config = {
        "run": run,
        "token": token,
        "node": node,
        "host": host,
        "slots": slots,
        "state_dir": state_dir,
        "owned": owned,
        "console": shown,
    }
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps(config).encode())
    return StartedAgent(process, node, host, slots, token, owner_write)


def _environment(env: dict[str, str], run: str, node: str, slots: int) -> dict[str, str]:
    marked = {k: v for k, v in env.items() if not k.startswith("PERDURE_")}
    marked[sweep.RUN_MARK] = run
    marked[sweep.NODE_MARK] = node
    marked[sweep.AGENT_MARK] = uuid.uuid4().hex[:12]
    if (
        slots > 1
    ):  # as torchrun does; read when libgomp is loaded, hence set before the zygote starts
        marked.setdefault("OMP_NUM_THREADS", "1")
    return marked


def _log(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
