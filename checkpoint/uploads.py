"""From a staged arena to a commit: the uploader's sending half.

The order is the commit protocol and must not change: the object, then its receipt (which says that
the object is whole and what its bytes are), then, when all receipts are there, the commit. Any
uploader that sees the last receipt may commit; the result is a pure function of the receipts, so
a race has equal losers. What dies in between leaves objects that nobody lists.

An arena is given back as soon as its bytes and their receipt are stored: the next save must not
wait for the other nodes. Who waits for the commit itself is told when it is there; until then this
uploader looks, ever more slowly, and not longer than COMMIT_WAIT_S.

A failed upload never ends training. The save's handle raises, the agent gets a note, the next save
starts afresh.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import crc32c

from perdure.checkpoint import keys, lineage
from perdure.checkpoint.arena import Arena
from perdure.checkpoint.boxes import Box
from perdure.checkpoint.codec import encode
from perdure.checkpoint.errors import CheckpointError, StoreError
from perdure.checkpoint.frames import Message
from perdure.checkpoint.leaves import leaf_from_json
from perdure.checkpoint.manifest import BLOCK_BYTES, AttemptRecord, Chunk, Point, Receipt
from perdure.checkpoint.store import Store

COMMIT_WAIT_S = 600.0  # the slowest rank's upload, after ours
_LOOK_S_MIN, _LOOK_S_MAX = 0.05, 2.0
_DIGEST_SPAN = 64  # blocks digested by one task: 16 MiB


class Waiter(Protocol):
    """The rank behind a staged save; it may be gone by the time it is told."""

    def uploaded(self, save: Staged) -> None: ...
    def committed(self, save: Staged) -> None: ...
    def failed(self, save: Staged, error: CheckpointError) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What lies where in an arena; the same from save to save."""

    size: int
    data_start: int
    chunks: tuple[Chunk, ...]
    aliases: dict[str, str]
    names: str

    @classmethod
    def from_message(cls, raw: Message) -> Layout:
        chunks = (
            Chunk(fqn, dtype, tuple(shape), Box(tuple(offsets), tuple(sizes)), begin, end)
            for fqn, dtype, shape, offsets, sizes, begin, end in raw["chunks"]
        )
        return cls(
            size=raw["size"],
            data_start=raw["data_start"],
            chunks=tuple(chunks),
            aliases=raw["aliases"],
            names=raw["names"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """One rank's part of one save, whole in memory."""

    id: int
    step: int
    attempt: str
    parent: Point | None
    writer: int
    writers: int
    layout: Layout
    leaves: dict[str, object]  # in their stored form
    arena: Arena
    started_at: float
    waiter: Waiter

    @property
    def point(self) -> Point:
        return Point(self.step, self.attempt)


def block_digests(data: memoryview, pool: Executor) -> Callable[[], tuple[int, ...]]:
    """Start computing the crc32c of each BLOCK_BYTES of `data`, the last one shorter.

    What is returned waits for them. It must not be called in the pool, whose threads do the work.
    """

    def span(begin: int) -> list[int]:
        end = min(begin + _DIGEST_SPAN * BLOCK_BYTES, len(data))
        return [crc32c.crc32c(data[at : at + BLOCK_BYTES]) for at in range(begin, end, BLOCK_BYTES)]

    spans = pool.map(span, range(0, len(data), _DIGEST_SPAN * BLOCK_BYTES))
    return lambda: tuple(digest for digests in spans for digest in digests)


class Uploads:
    """All saves of one uploader. Thread-safe."""

    def __init__(self, store: Callable[[], Store], pool: Executor, tell: Callable[[Message], None]):
        """`store` opens on first use; `tell` reaches the agent (and nobody where there is none)."""
        self._store = store
        self._pool = pool
        self._tell = tell
        self._changed = threading.Condition()
        self._sending = 0
        self._uncommitted: list[tuple[Staged, float]] = []  # with the time to give up
        self._looking = False
        self._records: dict[str, AttemptRecord] = {}
        self._told: set[Point] = set()

    def start(self, save: Staged) -> None:
        """Take over a staged save; returns at once."""
        with self._changed:
            self._sending += 1
        threading.Thread(
            target=self._send, args=(save,), name=f"upload-{save.step}", daemon=True
        ).start()

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything staged is stored with its receipt, or was given up."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._sending, timeout_s)

    def _send(self, save: Staged) -> None:
        try:
            self._put(save)
        except CheckpointError as error:
            self._failed(save, error)
        except Exception as error:  # noqa: BLE001 - the handle must fail, never wait for ever
            traceback.print_exc()
            self._failed(save, StoreError(f"the upload broke: {type(error).__name__}: {error}"))
        else:
            save.waiter.uploaded(save)  # the arena is free, whatever becomes of the commit
            self._commit_or_look(save)
        finally:
            with self._changed:
                self._sending -= 1
                self._changed.notify_all()

    def _put(self, save: Staged) -> None:
        store = self._store()
        record = self._record(save.attempt, save.parent)
        layout = save.layout
        image = memoryview(save.arena.map)[: layout.size]
        folder = keys.folder_key(save.step, record)
        lineage.refuse_second_save(store, folder, save.writer)
        key = keys.object_key(folder, save.writer)
        digests = block_digests(image[layout.data_start :], self._pool)
        store.put(key, image)
        receipt = Receipt(
            step=save.step,
            attempt=save.attempt,
            parent=save.parent,
            writer=save.writer,
            writers=save.writers,
            key=key,
            size=layout.size,
            data_start=layout.data_start,
            crc32c=digests(),
            header_crc32c=crc32c.crc32c(image[: layout.data_start]),
            chunks=layout.chunks,
            names=layout.names,
            world_size=save.writers,
            started_at=save.started_at,
            finished_at=time.time(),
            leaves={path: leaf_from_json(raw) for path, raw in save.leaves.items()},
            aliases=layout.aliases,
        )
        lineage.put_or_find(store, keys.receipt_key(folder, save.writer), encode(receipt))

    def _record(self, attempt: str, parent: Point | None) -> AttemptRecord:
        """The attempt's record, whose nonce names the folder in which all its writers meet.

        Made here where nobody has: the put is create-only, so all uploaders get the same one.
        """
        if attempt not in self._records:
            self._records[attempt] = lineage.open_attempt(self._store(), attempt, parent)
        return self._records[attempt]

    def _commit_or_look(self, save: Staged) -> None:
        """Commit if this was the last receipt, else keep looking in the background."""
        if self._try(save):
            return
        with self._changed:
            self._uncommitted.append((save, time.monotonic() + COMMIT_WAIT_S))
            if self._looking:
                return
            self._looking = True
        threading.Thread(target=self._look, name="look-for-commits", daemon=True).start()

    def _look(self) -> None:
        pause_s, known = _LOOK_S_MIN, 0
        while True:
            with self._changed:
                if not self._uncommitted:
                    self._looking = False
                    self._changed.notify_all()
                    return
                if len(self._uncommitted) > known:
                    pause_s = _LOOK_S_MIN  # a new save: its commit may be near
                known = len(self._uncommitted)
                pending = list(self._uncommitted)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LOOK_S_MAX)
            over = [save for save, end in pending if self._try(save) or self._given_up(save, end)]
            with self._changed:
                self._uncommitted = [
                    (save, end) for save, end in self._uncommitted if save not in over
                ]

    def _given_up(self, save: Staged, deadline: float) -> bool:
        if time.monotonic() < deadline:
            return False
        self._failed(
            save,
            StoreError(
                f"{save.point} was not committed: not every rank's part of it arrived",
                hint="a rank died or its upload failed; the next save is not affected",
            ),
        )
        return True

    def _try(self, save: Staged) -> bool:
        """Whether nothing is left to do for `save`: it is committed, or can never be."""
        try:
            record = self._record(save.attempt, save.parent)
            commit = lineage.try_commit(self._store(), keys.folder_key(save.step, record))
        except CheckpointError as error:
            if isinstance(error, StoreError):
                return False  # the store may come back: asked again until the time is over
            self._failed(save, error)
            return True
        if commit is None:
            return False
        with self._changed:
            first = save.point not in self._told
            self._told.add(save.point)
        if first:
            self._tell(
                {
                    "kind": "committed",
                    "attempt": save.attempt,
                    "step": save.step,
                    "tier": "store",
                }
            )
        save.waiter.committed(save)
        return True

    def _failed(self, save: Staged, error: CheckpointError) -> None:
        text = f"the checkpoint of {save.point} was not stored by rank {save.writer}: {error}"
        self._tell({"kind": "note", "text": text})
        save.waiter.failed(save, error)
