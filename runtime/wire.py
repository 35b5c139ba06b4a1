"""Frames between controller, agents and the command line: TCP, a shared token, JSON.

A connection begins with a handshake in which both sides prove that they know the run's token
without sending it; nothing but those 128 bytes is read from, or written to, a peer that has not
proved itself, so a port scanner can neither fill our memory nor see a secret. Then frames: a 4-byte
big-endian length and that many bytes of JSON, an object with `kind`. Nothing is ever unpickled.

`Link` is sans-loop: its owner watches `fileno()` in a selector, for writing only while
`wants_write`, and calls `receive()` and `flush()`. A link never raises into the loop: when it ends,
for whatever reason, `broken` says why, once and for good, and the messages that came before are
still delivered. `dial()` is the same link driven by a blocking wait, for the command line.

What it must never do: block (but for `Peer`), buffer without bound, or put a message's content into
an error.
"""

from __future__ import annotations

import hmac
import json
import os
import select
import socket
import time
from collections import deque
from typing import Any

from perdure.runtime.errors import WireError

Message = dict[str, Any]

FRAME_BYTES_MAX = 64 << 20
BUFFER_BYTES_MAX = 2 * FRAME_BYTES_MAX  # unsent: a peer that reads so little is given up
HANDSHAKE_S = 5.0
_NONCE = 32
_PROOF = 32
_READ = 1 << 18


def _proof(token: str, label: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(token.encode(), label + first + second, "sha256")


def encode_frame(message: Message) -> bytes:
    """Raises WireError when the message is larger than any peer would accept."""
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > FRAME_BYTES_MAX:
        raise WireError(
            f"a {message.get('kind')!r} message of {len(body)} bytes is over the limit",
            hint=f"a frame holds at most {FRAME_BYTES_MAX} bytes",
        )
    return len(body).to_bytes(4, "big") + body


class Link:
    """One connection, from its first byte on. `established` once both sides have proved themselves.

    Messages sent earlier wait for that. Made by `Link.dialling`, or by a `Listener`.
    """

    def __init__(self, sock: socket.socket, token: str, *, dialler: bool) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._token = token
        self._dialler = dialler
        self._nonce = os.urandom(_NONCE)
        self._answer = b""  # listener's proof, which the dialler awaits after its own went out
        self._connecting = False
        self._in = bytearray()
        self._out = bytearray()
        self._waiting: deque[bytes] = deque()  # frames that wait for the handshake
        self._waiting_bytes = 0
        self._begun_s = time.monotonic()
        self.established = False
        self.broken: str | None = None
        if not dialler:
            self._out += self._nonce
            self._no_delay()
            self.flush()

    @classmethod
    def dialling(cls, host: str, port: int, token: str) -> Link:
        """Begin to connect; never blocks (but for resolving a name). A refusal shows in `broken`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        link = cls(socket.socket(family, socket.SOCK_STREAM), token, dialler=True)
        link._connecting = True
        try:
            link._sock.connect((host, port))
        except BlockingIOError:
            return link
        except OSError as error:
            link._break(_words(error))
            return link
        link._connected()
        return link

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        return self.broken is None and (self._connecting or bool(self._out))

    @property
    def refused(self) -> bool:
        """Nobody listens there: the peer's process is gone, which is more than silence."""
        return self.broken == "connection refused"

    def stale(self, now_s: float) -> bool:
        """Did the handshake outlast its time (`now_s` on the monotonic clock)? Then close it."""
        return not self.established and now_s - self._begun_s > HANDSHAKE_S

    def send(self, message: Message) -> None:
        """Queue, and write as much as goes out at once. Silent on a broken link: see `broken`."""
        if self.broken is not None:
            return
        frame = encode_frame(message)
        if len(self._out) + self._waiting_bytes + len(frame) > BUFFER_BYTES_MAX:
            self._break("the peer does not read what it is sent")
            return
        if self.established:
            self._out += frame
            self.flush()
        else:
            self._waiting.append(frame)
            self._waiting_bytes += len(frame)

    def flush(self) -> None:
        """Write what the socket takes; call when it is writable."""
        if self._connecting and not self._finish_connect():
            return
        while self._out and self.broken is None:
            try:
                sent = self._sock.send(self._out)
            except BlockingIOError:
                return
            except OSError as error:
                self._break(_words(error))
                return
            del self._out[:sent]

    def receive(self) -> list[Message]:
        """What has arrived in whole; call when readable. The end of the stream shows in `broken`."""
        if self.broken is not None or (self._connecting and not self._finish_connect()):
            return []
        ended = self._read()
        messages: list[Message] = []
        if self.broken is None:
            if not self.established:
                self._handshake()
            if self.established:
                messages = self._frames()
        if ended is not None:
            self._break(ended)
        return messages

    def close(self) -> None:
        self._break("closed by us")

    def _read(self) -> str | None:
        # Reads are bounded a call, so that one loud peer cannot hold the loop.
        limit = _READ if self.established else _NONCE + _PROOF + _READ
        try:
            data = self._sock.recv(limit)
        except BlockingIOError:
            return None
        except OSError as error:
            return _words(error)
        if not data:
            return "closed by the peer"
        self._in += data
        return None

    def _handshake(self) -> None:
        if not self._dialler:
            if len(self._in) < _NONCE + _PROOF:
                return
            theirs, proof = self._take(_NONCE), self._take(_PROOF)
            if not hmac.compare_digest(proof, _proof(self._token, b"dial", self._nonce, theirs)):
                self._break("the peer does not know the run's token")
                return
            self._out += _proof(self._token, b"listen", theirs, self._nonce)
            self._establish()
            return
        if not self._answer:
            if len(self._in) < _NONCE:
                return
            theirs = self._take(_NONCE)
            self._out += self._nonce + _proof(self._token, b"dial", theirs, self._nonce)
            self._answer = _proof(self._token, b"listen", self._nonce, theirs)
            self.flush()
        if len(self._in) >= _PROOF:
            if hmac.compare_digest(self._take(_PROOF), self._answer):
                self._establish()
            else:
                self._break("the peer does not know the run's token")

    def _establish(self) -> None:
        self.established = True
        for frame in self._waiting:
            self._out += frame
        self._waiting.clear()
        self._waiting_bytes = 0
        self.flush()

    def _frames(self) -> list[Message]:
        messages: list[Message] = []
        begin = 0
        while len(self._in) - begin >= 4:
            size = int.from_bytes(self._in[begin : begin + 4], "big")
            if size > FRAME_BYTES_MAX:
                self._break(f"a frame of {size} bytes was announced, over the limit")
                break
            if len(self._in) - begin - 4 < size:
                break
            message = _decode(bytes(self._in[begin + 4 : begin + 4 + size]))
            if message is None:
                self._break("a frame is not a JSON object with a kind")
                break
            messages.append(message)
            begin += 4 + size
        del self._in[:begin]
        return messages

    def _take(self, count: int) -> bytes:
        taken = bytes(self._in[:count])
        del self._in[:count]
        return taken

    def _finish_connect(self) -> bool:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._break(_words(OSError(code, os.strerror(code))))
            return False
        try:
            self._sock.getpeername()
        except OSError:  # not connected yet: a spurious wake-up
            return False
        self._connected()
        return True

    def _connected(self) -> None:
        self._connecting = False
        self._no_delay()

    def _no_delay(self) -> None:
        if self._sock.family in (socket.AF_INET, socket.AF_INET6):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _break(self, why: str) -> None:
        if self.broken is None:
            self.broken = why
            self._connecting = False
            self._out.clear()
            self._waiting.clear()
            self._sock.close()


class Listener:
    """A listening socket; `accept()` gives links that still have to prove themselves."""

    def __init__(self, token: str, *, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.create_server((host, port), family=family, backlog=128)
        self._sock.setblocking(False)
        self._token = token
        self.host = host
        self.port: int = self._sock.getsockname()[1]

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> Link | None:
        """The next connection, or None. Never blocks."""
        try:
            sock, _address = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        return Link(sock, self._token, dialler=False)

    def close(self) -> None:
        self._sock.close()


class Peer:
    """A blocking face of a Link, for callers that have no loop."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._got: deque[Message] = deque()

    def send(self, message: Message, *, timeout_s: float = 10.0) -> None:
        """Raises WireError when the message does not go out in time."""
        self._link.send(message)
        end_s = time.monotonic() + timeout_s
        while self._link.wants_write:
            self._wait(end_s, "send to")
        if self._link.broken is not None:
            raise _gone(self._link.broken)

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None when the time is over. Raises WireError when the peer is gone."""
        end_s = time.monotonic() + timeout_s
        while not self._got:
            if self._link.broken is not None:
                raise _gone(self._link.broken)
            if not self._turn(end_s):
                return None
        return self._got.popleft()

    def close(self) -> None:
        self._link.close()

    def _wait(self, end_s: float, what: str) -> None:
        if not self._turn(end_s):
            raise WireError(f"could not {what} the peer in time", hint="is it alive?")

    def _turn(self, end_s: float) -> bool:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            return False
        writers = [self._link] if self._link.wants_write else []
        readable, writable, _ = select.select([self._link], writers, [], left_s)
        if writable:
            self._link.flush()
        if readable and self._link.broken is None:
            self._got.extend(self._link.receive())
        return bool(readable or writable)


def dial(host: str, port: int, token: str, timeout_s: float) -> Peer:
    """Connect and prove each other, at most `timeout_s`. Raises WireError."""
    link = Link.dialling(host, port, token)
    peer = Peer(link)
    end_s = time.monotonic() + timeout_s
    while not link.established and link.broken is None:
        try:
            peer._wait(end_s, "reach")
        except WireError:
            link.close()
            raise
    if link.broken is not None:
        raise _gone(link.broken)
    return peer


def _gone(why: str) -> WireError:
    return WireError(f"the connection ended: {why}", hint="is the peer alive, and of this run?")


def _decode(body: bytes) -> Message | None:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and isinstance(message.get("kind"), str) else None


def _words(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError) or error.errno == 111:
        return "connection refused"
    return (error.strerror or type(error).__name__).lower()
