"""One rank's connection to the uploader: requests in, replies and news out.

Requests are answered in order, each by one reply of the same kind or by `error`. News about saves
(`uploaded`, `committed`, `failed`) come in between, whenever they happen, and are for whoever is
still there: a rank that has gone changes nothing about what it staged.

| request | fields | reply |
|---|---|---|
| `hello` | url, rank, world_size, attempt or null | `hello` {pid} |
| `meet` | meeting, restore: bool, step or null; only without an agent | `meet` {attempt, restore} |
| `arena` | size | `arena` {arena} and a memfd |
| `free` | arena | `free` |
| `layout` | layout: a number of the rank's choice, and `uploads.Layout` | `layout` |
| `staged` | save, arena, layout, step, attempt, parent, leaves, started_at | `staged` |
| `open` | point | `open`: `Image.summary` |
| `fetch` | point, wants [[fqn, offsets, sizes]] | `fetch` {pieces, size} and a memfd |
| `done` | point | `done` |
| `bad` | point, why | `bad` |
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from typing import TYPE_CHECKING, Any

from perdure.checkpoint import lineage, meeting
from perdure.checkpoint.arena import Arena, make_memfd
from perdure.checkpoint.boxes import Box
from perdure.checkpoint.errors import CheckpointError, StateError
from perdure.checkpoint.frames import Channel, ChannelClosed, Message
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.uploads import Layout, Staged

if TYPE_CHECKING:
    from perdure.checkpoint.uploader import Uploader


class Session:
    """Runs on a thread of its own; news come from the uploads' threads."""

    def __init__(self, uploader: Uploader, channel: Channel) -> None:
        self._uploader = uploader
        self._channel = channel
        self._arenas: dict[int, Arena] = {}
        self._layouts: dict[int, Layout] = {}
        self._next_arena = 0
        self._rank, self._world_size = 0, 1
        self._attempt: str | None = None
        self._lock = threading.Lock()
        self._ended = False  # the rank asks no more; it may still wait for news
        self._pending = 0  # saves of which there will be news

    def run(self) -> None:
        """Until the rank closes its end, dies, or sends what is no frame."""
        try:
            while True:
                received = self._channel.receive()
                assert received is not None  # it waits for ever
                message, fds = received
                for fd in fds:  # ranks have none to give
                    os.close(fd)
                self._answer(message)
        except ChannelClosed:
            self._account(ended=True)

    def _answer(self, message: Message) -> None:
        kind = message["kind"]
        handler = getattr(self, f"_on_{kind}", None)
        fds: list[int] = []  # ours to close once they are sent
        try:
            if handler is None:
                raise StateError(f"the uploader knows no request {kind!r}")
            reply, fds = handler(message)
        except CheckpointError as error:
            reply = {"kind": "error", **error_to_json(error)}
        except Exception as error:  # noqa: BLE001 - the rank waits for an answer, whatever broke
            traceback.print_exc()
            reply = {
                "kind": "error",
                "error": "StoreError",
                "what": f"the uploader failed at {kind}: {type(error).__name__}: {error}",
                "hint": "its traceback is on its standard error; this is a defect of perdure",
            }
        try:
            self._channel.send(reply, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _on_hello(self, m: Message) -> tuple[Message, list[int]]:
        if m["url"] != self._uploader.url:
            raise StateError(
                f"this node's uploader serves {self._uploader.url}, not {m['url']}",
                hint="use perdure.init().checkpointer(), or give another run's URL only where no "
                "agent runs",
            )
        self._rank, self._world_size = m["rank"], m["world_size"]
        self._attempt = m["attempt"]
        return {"kind": "hello", "pid": os.getpid()}, []

    def _on_meet(self, m: Message) -> tuple[Message, list[int]]:
        store = self._uploader.store()
        if self._rank == 0:
            decision = meeting.decide(store, restore=m["restore"], step=m["step"])
            if self._world_size > 1:
                meeting.answer_all(store, m["meeting"], decision, self._world_size)
        else:
            decision = meeting.ask(store, m["meeting"], self._rank)
        self._attempt = str(decision["attempt"])
        return {"kind": "meet", **decision}, []

    def _on_arena(self, m: Message) -> tuple[Message, list[int]]:
        self._next_arena += 1
        fd = make_memfd("perdure-arena", m["size"])
        self._arenas[self._next_arena] = Arena(os.dup(fd), m["size"], self._next_arena)
        return {"kind": "arena", "arena": self._next_arena}, [fd]

    def _on_free(self, m: Message) -> tuple[Message, list[int]]:
        self._arenas.pop(m["arena"], None)  # an upload under way keeps its memory until it is done
        return {"kind": "free"}, []

    def _on_layout(self, m: Message) -> tuple[Message, list[int]]:
        self._layouts[m["layout"]] = Layout.from_message(m)
        return {"kind": "layout"}, []

    def _on_staged(self, m: Message) -> tuple[Message, list[int]]:
        self._account(pending=1)
        self._uploader.uploads.start(
            Staged(
                id=m["save"],
                step=m["step"],
                attempt=m["attempt"],
                parent=point_from_json(m["parent"]),
                writer=self._rank,
                writers=self._world_size,
                layout=self._layouts[m["layout"]],
                leaves=m["leaves"],
                arena=self._arenas[m["arena"]],
                started_at=m["started_at"],
                waiter=self,
            )
        )
        return {"kind": "staged"}, []

    def _on_open(self, m: Message) -> tuple[Message, list[int]]:
        point = _point(m["point"])
        try:
            return {"kind": "open", **self._uploader.image(point).summary()}, []
        except CheckpointError as error:
            self._uploader.image_failed(point, self._rank, self._attempt, error)
            raise

    def _on_fetch(self, m: Message) -> tuple[Message, list[int]]:
        point = _point(m["point"])
        try:
            image = self._uploader.image(point)
            wants = [(fqn, Box(tuple(o), tuple(s))) for fqn, o, s in m["wants"]]
            pieces = image.pieces(wants)
        except CheckpointError as error:
            self._uploader.image_failed(point, self._rank, self._attempt, error)
            raise
        return {"kind": "fetch", "pieces": pieces, "size": image.size}, [image.share()]

    def _on_done(self, m: Message) -> tuple[Message, list[int]]:
        self._uploader.image_done(_point(m["point"]), self._rank)
        return {"kind": "done"}, []

    def _on_bad(self, m: Message) -> tuple[Message, list[int]]:
        point = _point(m["point"])
        lineage.mark_bad(self._uploader.store(), point, m["why"])
        return {"kind": "bad"}, []

    def uploaded(self, save: Staged) -> None:
        self._news({"kind": "uploaded", "save": save.id})

    def committed(self, save: Staged) -> None:
        self._news({"kind": "committed", "save": save.id})
        self._account(pending=-1)

    def failed(self, save: Staged, error: CheckpointError) -> None:
        self._news({"kind": "failed", "save": save.id, **error_to_json(error)})
        self._account(pending=-1)

    def _account(self, *, pending: int = 0, ended: bool = False) -> None:
        """Close the socket once nobody asks any more and there is no news to come."""
        with self._lock:
            self._pending += pending
            self._ended = self._ended or ended
            over = self._ended and not self._pending
        if over:
            self._channel.close()

    def _news(self, message: Message) -> None:
        with contextlib.suppress(ChannelClosed):  # the rank is gone: nobody to tell
            self._channel.send(message)


def error_to_json(error: CheckpointError) -> dict[str, Any]:
    """An error for the rank to raise again under its own name."""
    body = {"error": type(error).__name__, "what": str(error), "hint": error.hint}
    return body | {name: value for name, value in vars(error).items() if name in ("key", "block")}


def point_from_json(raw: dict[str, Any] | None) -> Point | None:
    return None if raw is None else _point(raw)


def _point(raw: dict[str, Any]) -> Point:
    return Point(int(raw["step"]), str(raw["attempt"]))
