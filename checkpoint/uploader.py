"""The uploader: one process a node that does every put and get, so that ranks only copy memory.

It is started by the agent (with the listening socket that ranks connect to, and a pipe for what
the agent should know) or, where there is none, by a Checkpointer (with one end of a socket pair).
It keeps the memory of whatever a rank has staged: a rank that dies after that loses nothing.

A process of its own, never forked from a rank: the store's client has threads and does not survive
a fork. It imports obstore, and never torch. Its configuration, credentials included, comes as JSON
on stdin: never in argv, where everybody can read it.

Threads, because the heavy work (obstore, crc32c, pwrite) lets go of the interpreter: one a
connection, one an upload, a pool for blocks. With nothing to do all of them are blocked.

SIGTERM, or the end of whoever started it: finish what is staged, at most DRAIN_S, then leave.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from perdure.checkpoint.errors import CheckpointError
from perdure.checkpoint.frames import Channel, Message, peer_is_this_user
from perdure.checkpoint.image import Image, makes_bad
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.store import Store, open_store, without_userinfo
from perdure.checkpoint.uploader_session import Session
from perdure.checkpoint.uploads import Uploads

DRAIN_S = 25.0  # on SIGTERM: the agent waits 30
ORPHAN_DRAIN_S = 600.0  # when the rank that owns it is gone: nobody waits for us
IMAGE_IDLE_S = 60.0  # an image that nobody asked of for so long is given back
_POOL_THREADS = 16


class Uploader:
    """What the connections share: the store, the uploads, the images."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.url = without_userinfo(config["store"])
        self._full_url: str = config["store"]
        self._options = config.get("storage_options")
        self._control: int | None = config.get("control_fd")
        self._local_ranks: int | None = config.get("local_world_size")
        self._lock = threading.Lock()
        self._telling = threading.Lock()  # of its own: an agent that does not read holds up no rank
        self._opened: Store | None = None
        self._images: dict[Point, Image] = {}
        self._image_done: dict[Point, set[int]] = {}
        self.pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="blocks")
        self.uploads = Uploads(self.store, self.pool, self.tell)

    def store(self) -> Store:
        """Opened on first use: a rank that only connects costs no client."""
        with self._lock:
            if self._opened is None:
                self._opened = open_store(self._full_url, self._options)
            return self._opened

    def tell(self, message: Message) -> None:
        """A line to the agent; without one it is dropped, and so it is when the agent is gone."""
        if self._control is None:
            return
        line = json.dumps(message).encode() + b"\n"
        with self._telling, contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._control, line) :]

    def image(self, point: Point) -> Image:
        """The image of a checkpoint, shared by the ranks of this node. Raises CheckpointError."""
        store = self.store()
        with self._lock:
            if point not in self._images:
                self._images[point] = Image(store, point, self.pool)
                self._image_done[point] = set()
            return self._images[point]

    def image_failed(self, point: Point, rank: int, attempt: str | None, error: Exception) -> None:
        """Forget the image, so that whoever asks again reads afresh; tell the agent if it is bad."""
        self._drop(point)
        if isinstance(error, CheckpointError) and makes_bad(error):
            self.tell(
                {
                    "kind": "restore_failed",
                    "attempt": attempt,
                    "point": point._asdict(),
                    "rank": rank,
                    "why": str(error),
                }
            )

    def image_done(self, point: Point, rank: int) -> None:
        """`rank` has copied what it needs; after the node's last rank the memory is given back."""
        with self._lock:
            done = self._image_done.get(point)
            if done is None:
                return
            done.add(rank)
            over = self._local_ranks is not None and len(done) >= self._local_ranks
        if over:
            self._drop(point)

    def drop_idle_images(self) -> None:
        with self._lock:
            idle = [p for p, image in self._images.items() if image.idle_s() > IMAGE_IDLE_S]
        for point in idle:
            self._drop(point)

    def holds_images(self) -> bool:
        return bool(self._images)

    def _drop(self, point: Point) -> None:
        with self._lock:
            image = self._images.pop(point, None)
            self._image_done.pop(point, None)
        if image is not None:
            image.close()

    def serve(self, connection: socket.socket) -> threading.Thread:
        """Answer one rank on a thread of its own until it closes its end."""
        session = Session(self, Channel(connection))
        thread = threading.Thread(target=session.run, name="rank", daemon=True)
        thread.start()
        return thread


def _serve_node(uploader: Uploader, listener: socket.socket, control: int, stop: int) -> None:
    """Accept ranks until SIGTERM arrives or the agent's end of the control pipe is closed."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(stop, select.POLLIN)
    poll.register(control, 0)  # POLLERR: nobody reads it any more
    while True:
        ready = {fd for fd, _ in poll.poll(IMAGE_IDLE_S * 500)}
        if stop in ready or control in ready:
            return
        uploader.drop_idle_images()
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            if peer_is_this_user(connection, os.getuid()):
                uploader.serve(connection)
            else:
                uploader.tell({"kind": "note", "text": "a stranger knocked at the uploader"})
                connection.close()


def _serve_one(uploader: Uploader, connection: socket.socket, stop: int) -> float:
    """Serve the Checkpointer that started us. Returns how long its uploads may take to finish."""
    thread = uploader.serve(connection)
    over, tell_over = os.pipe()

    def wait() -> None:
        thread.join()
        os.close(tell_over)

    threading.Thread(target=wait, name="wait-for-the-end", daemon=True).start()
    poll = select.poll()
    poll.register(stop, select.POLLIN)
    poll.register(over, 0)  # POLLHUP
    signalled = stop in {fd for fd, _ in poll.poll()}
    return DRAIN_S if signalled else ORPHAN_DRAIN_S


def main() -> None:
    """Reads the configuration from stdin to its end; see the module for the rest."""
    config = json.loads(sys.stdin.buffer.read())
    stop, wake = os.pipe()
    os.set_blocking(wake, False)
    # The signal's number arrives on the pipe: the handler itself has nothing to do.
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the job; its owner tells us
    uploader = Uploader(config)
    drain_s = DRAIN_S
    try:
        if "listen_fd" in config:
            listener = socket.socket(fileno=config["listen_fd"])
            listener.setblocking(True)
            uploader.tell({"kind": "ready"})
            _serve_node(uploader, listener, config["control_fd"], stop)
        else:
            drain_s = _serve_one(uploader, socket.socket(fileno=config["channel_fd"]), stop)
        uploader.uploads.drain(drain_s)
    except BaseException:  # noqa: BLE001 - whatever it is, threads must not keep the process
        traceback.print_exc()
        os._exit(1)
    # Threads may still be blocked in reads; nothing they could do is worth waiting for.
    os._exit(0)
