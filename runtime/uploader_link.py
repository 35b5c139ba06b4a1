"""The agent's side of the node's uploader: its socket, its process, what it says.

The agent binds the socket that ranks connect to, so that it is there before any rank is; the uploader
is started when the first rank connects (a script that never saves costs nothing), or at a launch with
something to restore. It is a process of its own for good reasons (`checkpoint/uploader.py`), and one
that dies is started again when a rank next wants it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from perdure.runtime import proc
from perdure.runtime.sweep import socket_folder

_PROGRAM = "import sys; sys.path.pop(0); from perdure.checkpoint.uploader import main; main()"
_RESTART_S = 1.0  # not sooner after the last start: a broken installation must not spin


class UploaderLink:
    """`listener` is readable while a rank waits and no uploader runs; `control` is what it says."""

    def __init__(self, mark: str) -> None:
        self._folder = socket_folder(mark)
        os.mkdir(self._folder, 0o700)
        self.path = os.path.join(self._folder, "up.sock")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.path)
        self.listener.listen(256)
        self.pid: int | None = None
        self.control: int | None = None
        self._started_s = -_RESTART_S
        self._rest = b""

    def may_start_s(self) -> float:
        return self._started_s + _RESTART_S

    def start(self, config: Mapping[str, Any], env: Mapping[str, str]) -> None:
        """Start it, unless it runs."""
        if self.pid is not None:
            return
        self._started_s = time.monotonic()
        said, says = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(said, False)
        memory = os.memfd_create("perdure-uploader", os.MFD_CLOEXEC)
        os.write(memory, json.dumps({**config, "listen_fd": 3, "control_fd": 4}).encode())
        os.lseek(memory, 0, os.SEEK_SET)
        self.pid = proc.spawn(
            [sys.executable, "-c", _PROGRAM],
            env=env,
            fds={0: memory, 1: 2, 2: 2, 3: self.listener.fileno(), 4: says},
        )
        os.close(memory)
        os.close(says)
        self.control = said

    def heard(self) -> list[dict[str, Any]] | None:
        """Whole lines that arrived; None when its end of the pipe is closed."""
        assert self.control is not None
        try:
            data = os.read(self.control, 1 << 16)
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines if line]

    def silent(self) -> None:
        """Its end of the control pipe is closed: it has ended, or is about to."""
        if self.control is not None:
            os.close(self.control)
            self.control = None
        self._rest = b""

    def ended(self) -> None:
        self.pid = None

    def close(self) -> None:
        self.listener.close()
        os.unlink(self.path)
        os.rmdir(self._folder)
