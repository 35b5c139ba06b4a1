"""The records of a checkpoint. docs/checkpoint-format.md says why each field is there.

Four kinds, chained by digests so that whoever trusts a commit can verify every byte below it:

  Commit    the step exists           names the manifest and its sha256
  Manifest  what the step holds       names each writer's object, its receipt and its sha256
  Receipt   what one writer uploaded  byte ranges of its chunks, crc32c of every block
  (object)  a safetensors file        the bytes

A manifest grows with tensors plus writers; what grows with their product (byte ranges, digests)
stays in the receipts, of which a reader fetches those it needs.

Their form on storage is `codec.py`'s. Nothing here does I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from perdure.checkpoint.boxes import Box, Split
from perdure.checkpoint.errors import FormatError

BLOCK_BYTES = 256 * 1024
_ATTEMPT = re.compile(r"(\d{1,9})\.(\d{1,9})")


class Point(NamedTuple):
    """A commit by name: its step and the attempt that wrote it, "term.counter"."""

    step: int
    attempt: str

    def __str__(self) -> str:
        return f"step {self.step} of attempt {self.attempt}"


def attempt_order(attempt: str) -> tuple[int, int]:
    """Attempts only ever rise: (term, counter) orders them. Raises FormatError on another form."""
    if not (found := _ATTEMPT.fullmatch(attempt)):
        raise FormatError(f"{attempt!r} is not an attempt: they are written term.counter")
    return int(found[1]), int(found[2])


@dataclass(frozen=True, slots=True)
class Chunk:
    """One box of one tensor inside an object. `begin` and `end` count from the first data byte."""

    fqn: str
    dtype: str  # torch's name without "torch.": the true one, also where safetensors says U8
    shape: tuple[int, ...]  # of the whole tensor
    box: Box
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What one writer put, after it was put. Times are seconds since the epoch, its own clock."""

    step: int
    attempt: str
    parent: Point | None  # what the attempt restored from
    writer: int
    writers: int  # how many receipts make the step complete
    key: str
    size: int  # of the object, header included
    data_start: int  # where the first data byte is: the header's length
    crc32c: tuple[int, ...]  # of the data, one for each `block` bytes, the last one shorter
    header_crc32c: int
    chunks: tuple[Chunk, ...]
    names: str  # digest of the names every rank must hold alike: two that differ stop the commit
    world_size: int
    started_at: float
    finished_at: float
    block: int = BLOCK_BYTES
    leaves: Mapping[str, object] = field(default_factory=dict)  # plain values by path
    aliases: Mapping[str, str] = field(default_factory=dict)  # tied tensor: the one that is stored


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """One writer's object and receipt; `sha256` is the receipt's."""

    writer: int
    key: str
    size: int
    receipt: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is stored of a tensor and which writer holds which box of it."""

    dtype: str
    shape: tuple[int, ...]
    split: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    step: int
    attempt: str
    parent: Point | None
    world_size: int
    objects: tuple[ObjectRef, ...]  # by writer
    tensors: Mapping[str, Tensor]
    leaves: Mapping[str, object]
    aliases: Mapping[str, str]
    started_at: float  # the earliest of the receipts
    finished_at: float  # the latest

    @property
    def writers(self) -> int:
        return len(self.objects)

    @property
    def bytes(self) -> int:
        return sum(ref.size for ref in self.objects)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The commit point. A pure function of the receipts, so that a race has equal losers."""

    step: int
    attempt: str
    parent: Point | None
    manifest: str
    sha256: str  # of the manifest as stored
    bytes: int
    world_size: int
    committed_at: float  # `finished_at` of the manifest

    @property
    def point(self) -> Point:
        return Point(self.step, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """Made once an attempt. `nonce` names its folders, so that all its writers meet in one."""

    attempt: str
    parent: Point | None
    nonce: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BadMark:
    """A commit that could not be read back. Never restored by itself again."""

    step: int
    attempt: str
    why: str

    @property
    def point(self) -> Point:
        return Point(self.step, self.attempt)


Record = Receipt | Manifest | Commit | AttemptRecord | BadMark
