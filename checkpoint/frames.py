"""Frames between a rank and its node's uploader: JSON on a unix socket, file descriptors beside it.

A frame is a 4-byte big-endian length and that many bytes of JSON (an object with `kind`). When it
carries descriptors, they ride on its first byte (SCM_RIGHTS) and the object says how many in
`fds`, so the reader can match them to their frame however the kernel cuts the stream. Tensors
never pass here: they lie in memfds that both sides map.

Both sides import this, so it must stay free of torch and of obstore. Nothing is unpickled. A frame
too large to be one of ours closes the channel rather than the process.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

FRAME_BYTES_MAX = 256 << 20  # the chunk table of some 500,000 tensors; a rank has thousands
_FDS_MAX = 16
_READ_BYTES = 1 << 16
_LENGTH = struct.Struct(">I")


class ChannelClosed(ConnectionError):
    """The other side is gone, or sent what is not a frame."""


class Channel:
    """One end. Sends may come from several threads; receives from one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Returns when the kernel has it all. Raises ChannelClosed."""
        body = json.dumps(message | {"fds": len(fds)} if fds else message).encode()
        data = memoryview(_LENGTH.pack(len(body)) + body)
        try:
            with self._sending:
                sent = socket.send_fds(self._socket, [data], list(fds)) if fds else 0
                self._socket.sendall(data[sent:])
        except OSError as error:
            raise ChannelClosed(f"the channel broke while sending: {error}") from error

    def receive(self, timeout_s: float | None = None) -> tuple[Message, list[int]] | None:
        """The next frame and its descriptors (the caller's from now on), or None in time.

        `timeout_s` None waits for ever, 0 only looks. Raises ChannelClosed.
        """
        while (frame := self._frame()) is None:
            try:
                if not _readable(self._socket, timeout_s):
                    return None
                data, fds, _, _ = socket.recv_fds(
                    self._socket, _READ_BYTES, _FDS_MAX, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise ChannelClosed(f"the channel broke while reading: {error}") from error
            self._fds.extend(fds)
            if not data:
                raise ChannelClosed("the other side closed the channel")
            self._buffer += data
        return frame, [self._fds.popleft() for _ in range(frame.get("fds", 0))]

    def _frame(self) -> Message | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > FRAME_BYTES_MAX:
            raise ChannelClosed(f"a frame of {length} bytes was announced")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        try:
            message = json.loads(bytes(self._buffer[_LENGTH.size : end]))
        except ValueError as error:
            raise ChannelClosed("a frame was no JSON") from error
        if not isinstance(message, dict) or "kind" not in message:
            raise ChannelClosed("a frame was no object with a kind")
        if message.get("fds", 0) > len(self._fds):
            raise ChannelClosed("a frame came without its descriptors")
        del self._buffer[:end]
        return message

    def end(self) -> None:
        """Say that nothing more comes from this side; the other may still send."""
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


def _readable(sock: socket.socket, timeout_s: float | None) -> bool:
    if sock.fileno() < 0:
        raise OSError("closed on this side")
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def peer_is_this_user(sock: socket.socket, uid: int) -> bool:
    """Whether the process at the other end runs as `uid` (SO_PEERCRED: the kernel's word)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, peer_uid, _ = struct.unpack("3i", credentials)
    return bool(peer_uid == uid)
