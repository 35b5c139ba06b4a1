"""What the ranks of a node need of one checkpoint, fetched once and verified before anyone sees it.

An image is a sparse memfd that mirrors the checkpoint's objects: each has its own stretch, and the
blocks that some rank needs are written at their own offset after their crc32c was checked. So what
several ranks need is fetched once, whoever asks first, and a rank that comes late finds it there;
what nobody needs takes no memory. Ranks map the image and copy out of it.

The chain of trust: the commit names the manifest's sha256, the manifest each receipt's, the receipt
the crc32c of every block. One bad link fails the image for every rank of the node: a gang restores
one step, so there is nothing to be gained by letting some of them go on.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Executor
from itertools import accumulate

import crc32c

from perdure.checkpoint import lineage, plan
from perdure.checkpoint.arena import PAGE, make_memfd
from perdure.checkpoint.boxes import Box, parts_over
from perdure.checkpoint.errors import (
    CheckpointError,
    FormatError,
    IntegrityError,
    KeyMissing,
    StateError,
    StoreError,
)
from perdure.checkpoint.frames import Message
from perdure.checkpoint.leaves import leaf_to_json
from perdure.checkpoint.manifest import Chunk, Manifest, Point, Receipt, Tensor
from perdure.checkpoint.store import Store

FETCH_BYTES = 8 << 20  # one request: long enough for the store, short enough to run in parallel
_ABSENT, _CLAIMED, _THERE = 0, 1, 2


class Image:
    """One checkpoint as far as this node needs it. Thread-safe."""

    def __init__(self, store: Store, point: Point, pool: Executor) -> None:
        """Reads commit and manifest. Raises FormatError, IntegrityError or a StoreError."""
        self.point = point
        self._store = store
        self._pool = pool
        commit = lineage.load_commit(store, point)
        self.manifest: Manifest = lineage.load_manifest(store, commit)
        stretches = [-(-ref.size // PAGE) * PAGE for ref in self.manifest.objects]
        *self._bases, self.size = accumulate(stretches, initial=0)
        self.fd = make_memfd("perdure-restore", self.size)
        self._changed = threading.Condition()
        self._receipts: dict[int, Receipt] = {}
        self._blocks: dict[int, bytearray] = {}  # writer: state of each block
        self._error: CheckpointError | None = None
        self._flying = 0  # fetches that may still write into the image
        self._closed = False
        self._used_s = time.monotonic()
        self.bytes_fetched = 0

    def summary(self) -> Message:
        """What a rank needs to know to say what it wants."""
        manifest = self.manifest
        return {
            "step": manifest.step,
            "attempt": manifest.attempt,
            "world_size": manifest.world_size,
            "tensors": {fqn: [t.dtype, list(t.shape)] for fqn, t in manifest.tensors.items()},
            "aliases": dict(manifest.aliases),
            "leaves": {path: leaf_to_json(v, path) for path, v in manifest.leaves.items()},
        }

    def pieces(self, wants: list[tuple[str, Box]]) -> list[list[Message]]:
        """For each wanted box where its parts lie in the image, all of them fetched and verified.

        A piece is a chunk's box, the sub-box wanted of it, and the offset of the chunk's first byte
        (bytes outside the sub-box may be holes). Raises what the first failed fetch raised.
        """
        writers = {
            part.writer
            for fqn, box in wants
            for part in parts_over(self._tensor(fqn).shape, self._tensor(fqn).split, box)
        }
        chunks = self._chunks(writers)
        with self._changed:
            self._used_s = time.monotonic()
        answer: list[list[Message]] = []
        spans: dict[int, list[plan.Span]] = {writer: [] for writer in writers}
        for fqn, box in wants:
            found: list[Message] = []
            stored = self._tensor(fqn)
            for part in parts_over(stored.shape, stored.split, box):
                chunk = chunks.get((part.writer, self._name(fqn), part.box))
                if chunk is None:
                    raise FormatError(
                        f"the manifest of {self.point} names a part of {fqn} that the receipt of "
                        f"writer {part.writer} does not hold"
                    )
                for read in plan.reads(box, [chunk]):
                    spans[part.writer] += read.spans
                    found.append(self._piece(part.writer, chunk, read.box))
            answer.append(found)
        self._fetch({writer: self._blocks_of(writer, spans[writer]) for writer in writers})
        return answer

    def _blocks_of(self, writer: int, spans: list[plan.Span]) -> set[int]:
        receipt = self._receipts[writer]
        size = receipt.size - receipt.data_start
        return {
            block
            for begin, end in plan.fetches(spans, size, block=receipt.block)
            for block in range(begin // receipt.block, -(-end // receipt.block))
        }

    def _piece(self, writer: int, chunk: Chunk, box: Box) -> Message:
        return {
            "chunk": [chunk.box.offsets, chunk.box.sizes],
            "box": [box.offsets, box.sizes],
            "at": self._bases[writer] + self._receipts[writer].data_start + chunk.begin,
        }

    def _name(self, fqn: str) -> str:
        return self.manifest.aliases.get(fqn, fqn)

    def _tensor(self, fqn: str) -> Tensor:
        try:
            return self.manifest.tensors[self._name(fqn)]
        except KeyError:
            raise StateError(f"{self.point} holds no tensor {fqn!r}") from None

    def _chunks(self, writers: set[int]) -> dict[tuple[int, str, Box], Chunk]:
        with self._changed:
            missing = writers - set(self._receipts)
        loaded = lineage.load_receipts(self._store, self.manifest, missing)
        with self._changed:
            for receipt in loaded.values():
                self._receipts[receipt.writer] = receipt
                self._blocks.setdefault(receipt.writer, bytearray(len(receipt.crc32c)))
        return {
            (writer, chunk.fqn, chunk.box): chunk
            for writer in writers
            for chunk in self._receipts[writer].chunks
        }

    def _fetch(self, needed: dict[int, set[int]]) -> None:
        """Returns when all blocks in `needed` are there; fetches those that nobody claimed."""
        runs: list[tuple[int, int, int]] = []
        with self._changed:
            for writer, blocks in needed.items():
                states = self._blocks[writer]
                mine = sorted(block for block in blocks if states[block] == _ABSENT)
                for block in mine:
                    states[block] = _CLAIMED
                most = max(1, FETCH_BYTES // self._receipts[writer].block)
                runs += [(writer, begin, end) for begin, end in _runs(mine, most)]
            self._flying += len(runs)
        for run in runs:
            self._pool.submit(self._fetch_run, *run)

        def over() -> bool:
            return self._error is not None or all(
                self._blocks[writer][block] == _THERE
                for writer, blocks in needed.items()
                for block in blocks
            )

        with self._changed:
            self._changed.wait_for(over)  # bounded: each fetch has the store's deadline
            if self._error is not None:
                raise self._error

    def _fetch_run(self, writer: int, first: int, end: int) -> None:
        """Fetch blocks [first, end), check them, and only then write them into the image."""
        error: CheckpointError | None = None
        try:
            if self._error is None:
                self._fetch_checked(writer, first, end)
        except CheckpointError as caught:
            error = caught
        except Exception as caught:  # noqa: BLE001 - a defect of ours fails the restore, never hangs it
            error = StoreError(f"reading {self.point} failed: {type(caught).__name__}: {caught}")
        with self._changed:
            if error is not None:
                self._error = self._error or error
            else:
                self._blocks[writer][first:end] = bytes([_THERE]) * (end - first)
            self._flying -= 1
            self._used_s = time.monotonic()
            self._close_if_over()
            self._changed.notify_all()

    def _fetch_checked(self, writer: int, first: int, end: int) -> None:
        receipt = self._receipts[writer]
        data_bytes = receipt.size - receipt.data_start
        begin_byte, end_byte = first * receipt.block, min(end * receipt.block, data_bytes)
        start = receipt.data_start
        data = memoryview(self._store.get(receipt.key, start + begin_byte, start + end_byte))
        for block in range(first, end):
            at = (block - first) * receipt.block
            if crc32c.crc32c(data[at : at + receipt.block]) != receipt.crc32c[block]:
                raise IntegrityError(
                    f"block {block} of {receipt.key} does not match its checksum",
                    key=receipt.key,
                    block=block,
                )
        at = self._bases[writer] + start + begin_byte
        while data:  # the kernel takes at most 2 GiB at once
            written = os.pwrite(self.fd, data, at)
            data, at = data[written:], at + written
        with self._changed:
            self.bytes_fetched += end_byte - begin_byte

    def share(self) -> int:
        """A descriptor of the image for a rank: the caller's to close."""
        with self._changed:
            if self._closed:
                raise StoreError(f"the image of {self.point} was given back just now")
            return os.dup(self.fd)

    def idle_s(self) -> float:
        """Seconds since a rank asked for something or something arrived; 0 while it is fetched."""
        with self._changed:
            return 0.0 if self._flying else time.monotonic() - self._used_s

    def close(self) -> None:
        """The ranks' mappings keep the memory that they still need."""
        with self._changed:
            self._closed = True
            self._close_if_over()

    def _close_if_over(self) -> None:
        # Never under a fetch: its descriptor's number might be another file's by then.
        if self._closed and not self._flying and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _runs(blocks: list[int], most: int) -> list[tuple[int, int]]:
    """Consecutive numbers as [first, end), none longer than `most`."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block and block - runs[-1][0] < most:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


def makes_bad(error: CheckpointError) -> bool:
    """Whether an error says that the checkpoint cannot be read, now or ever.

    A store that does not answer says nothing about what it holds.
    """
    return isinstance(error, IntegrityError | FormatError | KeyMissing)
