"""A rank's end of the uploader: one socket, and nothing else that a fork could break.

No thread and no store client lives in a rank. News about saves are read when somebody asks
(`Handle.wait`, the next `save`), never in the background. A child forked from a rank (a loader's
worker) gets its copy of the socket closed at once, so that the uploader still notices the rank's
end, and ForkError if it tries to use the client.

Under an agent the uploader is the node's, found by its socket; when it died, the agent starts a new
one and the next request connects to that. Without an agent the client starts one of its own, in a
session of its own, so that what kills the rank's process group does not take the staged save along.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from perdure.checkpoint import errors
from perdure.checkpoint.errors import CheckpointError, ForkError, StoreError
from perdure.checkpoint.frames import Channel, ChannelClosed, Message
from perdure.checkpoint.store import without_userinfo

NEWS = ("uploaded", "committed", "failed")
CONNECT_S = 30.0  # the agent starts the uploader on the first connection, or anew after its death
CLOSE_S = 600.0  # an own uploader that is still sending when the rank ends
_PAUSE_S = 0.02

_living: weakref.WeakSet[UploaderClient] = weakref.WeakSet()


class UploaderLost(StoreError):
    """The uploader died: what it had not stored is gone, the next request finds a new one."""

    default_hint = "training may go on: the next save uses a new uploader; see the agent's log"


def uploader_argv() -> list[str]:
    """How an uploader is started; its configuration goes to its stdin."""
    code = "import sys; sys.path.pop(0); from perdure.checkpoint.uploader import main; main()"
    return [sys.executable, "-c", code]


class UploaderClient:
    """Requests and their replies. Thread-safe; for the process that made it."""

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, Any] | None,
        socket_path: str | None,
        rank: int,
        world_size: int,
        attempt: str | None,
    ) -> None:
        self._url = url
        self._options = dict(storage_options) if storage_options else None
        self._path = socket_path
        self._hello = {
            "kind": "hello",
            "url": url,
            "rank": rank,
            "world_size": world_size,
            "attempt": attempt,
        }
        self._on_news: Callable[[Message], None] = _nobody
        self._on_lost: Callable[[CheckpointError], None] = _nobody
        self._lock = threading.RLock()
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = os.getpid()
        self.uploader_pid: int | None = None
        _living.add(self)

    def listen(
        self, on_news: Callable[[Message], None], on_lost: Callable[[CheckpointError], None]
    ) -> None:
        """`on_news` gets what concerns saves, `on_lost` is called when the uploader died."""
        self._on_news, self._on_lost = on_news, on_lost

    def request(self, message: Message) -> tuple[Message, list[int]]:
        """The reply and its descriptors. Raises what the uploader raised, or UploaderLost."""
        self.check_process()
        with self._lock:
            channel = self._connected()
            try:
                channel.send(message)
                return self._reply(channel, message["kind"])
            except ChannelClosed as error:
                raise self._lose(error) from error

    def look(self, timeout_s: float = 0.0) -> None:
        """Hand on whatever news came; waits at most `timeout_s` for the first of them."""
        self.check_process()
        with self._lock:
            if self._channel is None:
                return
            try:
                while (received := self._channel.receive(timeout_s)) is not None:
                    self._on_news(received[0])
                    timeout_s = 0.0
            except ChannelClosed as error:
                raise self._lose(error) from error

    def fileno(self) -> int:
        """The socket to poll for news, -1 when there is none."""
        return -1 if self._channel is None else self._channel.fileno()

    def check_process(self) -> None:
        """Raises ForkError in a forked child."""
        if os.getpid() != self._pid:
            raise ForkError(
                "this Checkpointer was made by the process that forked this one",
                hint="save and restore in the training process; a loader's worker needs neither",
            )

    def close(self) -> None:
        """Let go of the uploader. Its own it waits for: the job must not end before its uploads."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            channel, self._channel = self._channel, None
            process, self._process = self._process, None
            if channel is not None:
                channel.end()
                if process is not None:
                    self._last_news(channel)
                channel.close()
            if process is not None:
                process.kill()  # it has ended, or had its time
                process.wait()

    def _last_news(self, channel: Channel) -> None:
        """Until our own uploader has finished what is staged and closes its end by ending."""
        deadline = time.monotonic() + CLOSE_S
        with contextlib.suppress(ChannelClosed):
            while (received := channel.receive(max(0.0, deadline - time.monotonic()))) is not None:
                self._on_news(received[0])

    def _reply(self, channel: Channel, kind: str) -> tuple[Message, list[int]]:
        while True:
            received = channel.receive()  # bounded by the uploader: every request there is
            assert received is not None
            reply, fds = received
            if reply["kind"] in NEWS:
                self._on_news(reply)
            elif reply["kind"] == "error":
                raise error_from_json(reply)
            elif reply["kind"] == kind:
                return reply, fds
            else:
                raise ChannelClosed(f"a {reply['kind']} came in answer to {kind}")

    def _lose(self, error: ChannelClosed) -> UploaderLost:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()  # it closed its end: it is dead, or must be
            self._process.wait()
            self._process = None
        lost = UploaderLost(f"the checkpoint uploader is gone: {error}")
        self._on_lost(lost)
        return lost

    def _connected(self) -> Channel:
        if self._channel is None:
            sock = self._start() if self._path is None else self._connect(self._path)
            self._channel = Channel(sock)
            try:
                hello = self._hello | {"url": without_userinfo(self._url)}
                self._channel.send(hello)
                reply, _ = self._reply(self._channel, "hello")
            except (ChannelClosed, CheckpointError) as error:
                self._channel.close()
                self._channel = None
                if isinstance(error, ChannelClosed):
                    raise self._lose(error) from error
                raise
            self.uploader_pid = reply["pid"]
        return self._channel

    def _connect(self, path: str) -> socket.socket:
        deadline = time.monotonic() + CONNECT_S
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(path)
                return sock
            except OSError as error:
                sock.close()
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"the node's checkpoint uploader does not answer: {error}",
                        hint="look at the agent's log; PERDURE_UPLOADER names its socket",
                    ) from error
                time.sleep(_PAUSE_S)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                uploader_argv(),
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            config = {
                "store": self._url,
                "storage_options": self._options,
                "channel_fd": theirs.fileno(),
                "local_world_size": 1,
            }
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(config).encode())
        return ours

    def _forked(self) -> None:
        """In a child: the rank's end must close when the rank ends, whatever its children do."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._process = None


def _nobody(_: object) -> None:
    """Before somebody listens there is nothing to tell."""


def error_from_json(raw: Message) -> CheckpointError:
    """The error that the uploader met, under its own name."""
    kind = getattr(errors, raw["error"], None)
    what, hint = raw["what"], raw["hint"]
    if kind is errors.IntegrityError:
        error = errors.IntegrityError(what, key=raw["key"], block=raw.get("block"))
        error.hint = hint
        return error
    if isinstance(kind, type) and issubclass(kind, CheckpointError):
        return kind(what, hint=hint)
    return StoreError(what, hint=hint)


def _after_fork() -> None:
    for client in list(_living):
        client._forked()


os.register_at_fork(after_in_child=_after_fork)
