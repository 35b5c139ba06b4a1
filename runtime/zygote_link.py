"""The agent's end of a zygote: start one, ask it for ranks, hear what became of that.

A request is JSON in a memfd, sent with the descriptors that the ranks shall have: no limit of a
datagram applies to a large environment, and an environment with secrets touches no disk. Answers are
small datagrams. The first zygote of a node is forked (it is importing torch before the agent has read
its own configuration); one with other load-time variables is started as a program of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perdure.runtime import proc

FDS_MAX = 250  # of one message: the kernel's limit is 253
_ANSWER_BYTES_MAX = 1 << 16


class ZygoteLink:
    """`environment`: what the zygote was started with, to be compared with what ranks want."""

    def __init__(self, sock: socket.socket, pid: int, environment: Mapping[str, str]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.pid = pid
        self.environment = dict(environment)

    def fileno(self) -> int:
        return self._sock.fileno()

    def ask(self, request: Mapping[str, Any], fds: Sequence[int]) -> bool:
        """Send a launch. False if the zygote is gone."""
        memory = os.memfd_create("perdure-launch", os.MFD_CLOEXEC)
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(json.dumps(request).encode())
            os.lseek(memory, 0, os.SEEK_SET)
            socket.send_fds(self._sock, [b"launch"], [memory, *fds])
        except (BrokenPipeError, ConnectionResetError):
            return False
        finally:
            os.close(memory)
        return True

    def answers(self) -> list[dict[str, Any]]:
        """What has arrived; `{"gone": True}` last when the zygote is dead."""
        found: list[dict[str, Any]] = []
        while True:
            try:
                data = self._sock.recv(_ANSWER_BYTES_MAX)
            except BlockingIOError:
                return found
            except ConnectionResetError:
                data = b""
            if not data:
                found.append({"gone": True})
                return found
            found.append(json.loads(data))

    def close(self) -> None:
        """End it. Its ranks are the agent's children and live on."""
        self._sock.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def fork() -> tuple[ZygoteLink | None, Callable[[], None] | None]:
    """Start a zygote by a fork of this process. In a rank: what that rank runs."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent = os.getpid()
    pid = proc.fork()
    if pid == 0:
        ours.close()
        from perdure.runtime import zygote

        return None, zygote.serve(theirs, agent)
    theirs.close()
    return ZygoteLink(ours, pid, os.environ), None


def start(environment: Mapping[str, str]) -> ZygoteLink:
    """Start a zygote as a program of its own, with load-time variables other than the agent's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with open(os.devnull, "rb") as nothing:
        pid = proc.spawn(
            [sys.executable, "-u", "-c", bootstrap("zygote", "3")],
            env=environment,
            fds={0: nothing.fileno(), 1: 2, 2: 2, 3: theirs.fileno()},
        )
    theirs.close()
    return ZygoteLink(ours, pid, environment)


def bootstrap(module: str, arguments: str) -> str:
    """The `-c` program of our own processes, padded: a rank shows its own command line in there."""
    code = f"import sys; sys.path.pop(0); from perdure.runtime.{module} import main; main({arguments})()"
    return f"{code}  #".ljust(2048, " ")
