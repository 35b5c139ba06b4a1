"""A node's uploader inside the test process: real sessions and sockets, a store in memory."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from perdure.checkpoint.api import Checkpointer
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.store import MemoryStore, Store, open_store
from perdure.checkpoint.uploader import Uploader

_numbers = itertools.count(1)


@dataclass
class Node:
    """What an agent would give a rank, and what it would be told."""

    url: str
    path: str
    uploader: Uploader
    control: int
    made: list[Checkpointer] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return open_store(self.url)

    def rank(
        self, rank: int = 0, of: int = 1, attempt: str = "1.1", restore: Point | None = None
    ) -> Checkpointer:
        """A Checkpointer as a rank of `of` ranks would make it under an agent."""
        point = json.dumps(restore._asdict()) if restore else ""
        made = Checkpointer(
            self.url,
            rank=rank,
            world_size=of,
            attempt=attempt,
            uploader=self.path,
            restore=point,
        )
        self.made.append(made)
        return made

    def save(self, step: int, states: list[Any], attempt: str = "1.1") -> Point:
        """One save by as many ranks as there are states, committed."""
        ranks = [self.rank(i, len(states), attempt) for i in range(len(states))]
        handles = [rank.save(step, state) for rank, state in zip(ranks, states, strict=True)]
        for handle in handles:
            handle.wait(10)
        return Point(step, attempt)

    def told(self) -> list[dict[str, Any]]:
        """The lines that the agent would have read by now."""
        text = b""
        while chunk := _read(self.control):
            text += chunk
        return [json.loads(line) for line in text.splitlines()]

    def alter(self, key: str, change: Callable[[bytearray], None]) -> None:
        """Change an object behind everybody's back."""
        store = self.store
        assert isinstance(store, MemoryStore)
        data = bytearray(store.get(key))
        before = bytes(data)
        change(data)
        assert bytes(data) != before, "the fault was not injected"
        store.put(key, bytes(data))

    def objects(self, ending: str) -> list[str]:
        found = [entry.key for entry in self.store.list("checkpoints/objects")]
        return [key for key in found if key.endswith(ending)]


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    url = f"memory://node-{next(_numbers)}"
    read, write = os.pipe()
    os.set_blocking(read, False)
    uploader = Uploader({"store": url, "control_fd": write, "local_world_size": 2})
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "up.sock"))
    listener.listen(16)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # the fixture is over
                return
            uploader.serve(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    node = Node(url, str(tmp_path / "up.sock"), uploader, read)
    yield node
    for checkpointer in node.made:
        checkpointer.close()
    uploads = uploader.uploads
    assert uploads.drain(10)
    with uploads._changed:  # news of commits are over too: no socket outlives the test
        assert uploads._changed.wait_for(lambda: not uploads._looking, 10)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)
    uploader.pool.shutdown()
    os.close(read)
    os.close(write)
