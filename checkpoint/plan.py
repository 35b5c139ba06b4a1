"""Who writes which bytes, and who reads which. Pure, and the same on every rank.

**Writing.** A tensor that several ranks hold alike is written by one of them. Each rank works out
by itself which (`assign_writers`): the answer depends on names and sizes alone, so nothing is
gathered through rank 0, and no rank waits for another to plan.

**The file image.** The arena a rank copies into is the safetensors file itself, so its header is
known before any byte is copied (`file_image`). safetensors allows no holes between tensors; ours
are ordered by element size, largest first, which aligns every one of them without any. The header
is padded with spaces so that data begins on a page.

**Reading.** What a rank wants is a box of a tensor; what is stored are chunks. Each overlap is a
few runs of bytes, one where the box is cut in dimension 0 alone, a row each elsewhere (`reads`).
What is fetched is widened to whole checksum blocks (`fetches`): bytes that cannot be verified must
never enter a state.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from perdure.checkpoint.boxes import Box, whole
from perdure.checkpoint.errors import StateError
from perdure.checkpoint.manifest import BLOCK_BYTES, Chunk

DATA_ALIGNMENT = 4096
HEADER_BYTES_MAX = 100_000_000  # safetensors refuses a longer one
FETCH_GAP_BYTES = 1024 * 1024  # a request costs about as much as this many bytes

# torch's name: safetensors' name, bytes an element. What safetensors cannot load lies as U8.
_DTYPES = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "complex64": ("C64", 8),
}


class Span(NamedTuple):
    """Bytes [begin, end), counted from the first data byte of an object."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One box of one tensor that a writer is to store."""

    fqn: str
    dtype: str  # torch's name without "torch."
    shape: tuple[int, ...]  # of the whole tensor
    box: Box
    itemsize: int  # bytes an element

    @property
    def nbytes(self) -> int:
        return self.box.elements * self.itemsize

    @property
    def name(self) -> str:
        """Its key in the safetensors file: the fqn for a whole tensor, else with the offsets."""
        if self.box == whole(self.shape):
            return self.fqn
        return f"{self.fqn}@{'_'.join(map(str, self.box.offsets))}"


@dataclass(frozen=True, slots=True)
class FileImage:
    """A safetensors file before its data: `header`, then the chunks' bytes without any hole."""

    header: bytes
    chunks: tuple[Chunk, ...]  # in the order in which they lie
    data_bytes: int

    @property
    def size(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True, slots=True)
class Read:
    """Part of what is wanted. The spans, one after the other, are `box` in C order."""

    chunk: Chunk
    box: Box  # in the tensor's own coordinates
    spans: tuple[Span, ...]


def assign_writers(sizes: Iterable[tuple[str, int]], world_size: int) -> dict[str, int]:
    """Who writes each of the tensors that all ranks hold alike: fqn to rank.

    `sizes` are (fqn, bytes). The largest first, each to the rank with the least so far: the
    heaviest rank then has at most 4/3 of the best possible share.
    """
    load = [(0, rank) for rank in range(world_size)]
    writers: dict[str, int] = {}
    for fqn, nbytes in sorted(sizes, key=lambda item: (-item[1], item[0])):
        held, rank = load[0]
        heapq.heapreplace(load, (held + nbytes, rank))
        writers[fqn] = rank
    return writers


def file_image(slots: Sequence[Slot], metadata: Mapping[str, str] | None = None) -> FileImage:
    """Lay the slots out as a safetensors file. Raises StateError when two would have one name."""
    ordered = sorted(slots, key=lambda slot: (-slot.itemsize, slot.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    chunks: list[Chunk] = []
    at = 0
    for slot in ordered:
        if slot.name in header:
            raise StateError(
                f"two tensors of the state would be stored as {slot.name!r}",
                hint="Rename one of them.",
            )
        end = at + slot.nbytes
        known, itemsize = _DTYPES.get(slot.dtype, ("U8", 0))
        shape = [*slot.box.sizes] if itemsize == slot.itemsize else [slot.nbytes]
        name = known if itemsize == slot.itemsize else "U8"
        header[slot.name] = {"dtype": name, "shape": shape, "data_offsets": [at, end]}
        chunks.append(Chunk(slot.fqn, slot.dtype, slot.shape, slot.box, at, end))
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    if padded > HEADER_BYTES_MAX:
        raise StateError(f"a header of {padded} bytes: safetensors allows {HEADER_BYTES_MAX}")
    return FileImage(padded.to_bytes(8, "little") + text.ljust(padded), tuple(chunks), at)


def reads(wanted: Box, chunks: Iterable[Chunk]) -> list[Read]:
    """Which bytes of which chunks make up `wanted`; nothing for a chunk that shares no element."""
    found = []
    for chunk in chunks:
        box = wanted.overlap(chunk.box)
        if box is not None and box.elements:
            found.append(Read(chunk, box, tuple(_spans(box, chunk))))
    return found


def _spans(box: Box, chunk: Chunk) -> list[Span]:
    """The bytes of `box` within its chunk, in C order, runs as long as they come."""
    itemsize = (chunk.end - chunk.begin) // chunk.box.elements
    held = chunk.box.sizes
    inner = [o - c for o, c in zip(box.offsets, chunk.box.offsets, strict=True)]
    # Trailing dimensions that are taken whole make one run; so does the one before them.
    dim = len(held)
    while dim > 0 and box.sizes[dim - 1] == held[dim - 1]:
        dim -= 1
    cut = max(dim - 1, 0)
    strides = [math.prod(held[d + 1 :]) * itemsize for d in range(len(held))]
    length = math.prod(box.sizes[cut:]) * itemsize
    begin = chunk.begin + sum(map(int.__mul__, inner, strides))
    steps = (range(0, n * s, s) for n, s in zip(box.sizes[:cut], strides[:cut], strict=True))
    return [
        Span(begin + sum(step), begin + sum(step) + length) for step in itertools.product(*steps)
    ]


def fetches(
    spans: Iterable[Span],
    data_bytes: int,
    *,
    block: int = BLOCK_BYTES,
    gap: int = FETCH_GAP_BYTES,
) -> list[Span]:
    """Spans of one object widened to whole blocks and merged where less than `gap` lies between.

    `data_bytes` is where the object's data ends: the last block may be shorter.
    """
    merged: list[Span] = []
    for span in sorted(spans):
        begin = span.begin // block * block
        end = min(-(-span.end // block) * block, data_bytes)
        if merged and begin <= merged[-1].end + gap:
            merged[-1] = Span(merged[-1].begin, max(merged[-1].end, end))
        else:
            merged.append(Span(begin, end))
    return merged
