"""Boxes: which part of a tensor somebody holds, and whether parts make a whole.

A box is where a part begins in each dimension and how far it reaches. A tensor is stored exactly
when the boxes of all its parts tile it: nothing missing, nothing twice. That is checked before a
commit, whatever the layout that made the boxes; a layout is not trusted to be right.

A split that is even, as sharding makes it, is not written down box by box: a `Grid` says how large
a cell is and which writer holds which cell, so that a manifest grows with the number of tensors and
not with tensors times ranks. It is found in the boxes (`grid_of`), not declared by a writer, and it
is used only when it gives back the same boxes.

Pure: tuples in, tuples out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """Where a part begins and how far it reaches, in elements. A 0-d tensor has the box ((), ())."""

    offsets: Ints
    sizes: Ints

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """What both hold; None when they share no element."""
        begins = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(
            min(a + n, b + m) - begin
            for a, n, b, m, begin in zip(
                self.offsets, self.sizes, other.offsets, other.sizes, begins, strict=True
            )
        )
        return None if any(size <= 0 for size in sizes) else Box(begins, sizes)


def whole(shape: Ints) -> Box:
    return Box((0,) * len(shape), shape)


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor, and the writer whose object holds it."""

    writer: int
    box: Box


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of one size (smaller at the far edges). Cell (i, j) is held by `first + i*s0 + j*s1`.

    One cell as large as the tensor is a tensor that one writer holds.
    """

    cell: Ints
    first: int
    strides: Ints


@dataclass(frozen=True, slots=True)
class Parts:
    """Boxes one by one, where no grid fits."""

    parts: tuple[Part, ...]


Split = Grid | Parts


def parts_over(shape: Ints, split: Split, wanted: Box) -> Iterator[Part]:
    """The parts that share an element with `wanted`, without looking at the others of a grid."""
    if isinstance(split, Parts):
        yield from (part for part in split.parts if part.box.overlap(wanted))
        return
    if not wanted.elements or not math.prod(shape):
        return
    spans = [
        range(begin // cell, -(-min(begin + size, length) // cell))
        for begin, size, cell, length in zip(
            wanted.offsets, wanted.sizes, split.cell, shape, strict=True
        )
    ]
    for index in itertools.product(*spans):
        yield _cell(shape, split, index)


def all_parts(shape: Ints, split: Split) -> list[Part]:
    return list(parts_over(shape, split, whole(shape)))


def _cell(shape: Ints, grid: Grid, index: Ints) -> Part:
    offsets = tuple(i * cell for i, cell in zip(index, grid.cell, strict=True))
    sizes = tuple(map(min, grid.cell, (n - o for n, o in zip(shape, offsets, strict=True))))
    writer = grid.first + sum(i * stride for i, stride in zip(index, grid.strides, strict=True))
    return Part(writer, Box(offsets, sizes))


def grid_of(shape: Ints, parts: Sequence[Part]) -> Grid | None:
    """The grid that gives exactly these parts (none empty), or None when there is none."""
    by_offset = {part.box.offsets: part for part in parts}
    corner = by_offset.get((0,) * len(shape))
    if corner is None or len(by_offset) != len(parts) or not all(corner.box.sizes):
        return None
    cell = corner.box.sizes
    counts = [-(-n // c) for n, c in zip(shape, cell, strict=True)]
    if math.prod(counts) != len(parts):
        return None
    strides = []
    for dim, count in enumerate(counts):
        step = tuple(cell[dim] if d == dim else 0 for d in range(len(shape)))
        neighbour = by_offset.get(step) if count > 1 else corner
        if neighbour is None:
            return None
        strides.append(neighbour.writer - corner.writer)
    grid = Grid(cell, corner.writer, tuple(strides))
    same = all(by_offset.get(part.box.offsets) == part for part in all_parts(shape, grid))
    return grid if same else None


def tiles_exactly(shape: Ints, boxes: Sequence[Box]) -> str | None:
    """None when the boxes cover every element of `shape` exactly once, else the problem in words.

    Empty boxes are allowed: a rank may hold no row of a tensor. Boxes are swept along the dimension
    in which they begin at most places, so an even split of any one dimension costs n log n.
    """
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            return f"box {_words(box)} has not the {len(shape)} dimensions of {list(shape)}"
        if any(o < 0 or s < 0 for o, s in zip(box.offsets, box.sizes, strict=True)):
            return f"box {_words(box)} has a negative offset or size"
        reaches = zip(box.offsets, box.sizes, shape, strict=True)
        if box.elements and any(o + s > n for o, s, n in reaches):
            return f"box {_words(box)} reaches out of {list(shape)}"
    filled = [box for box in boxes if box.elements]
    if clash := _overlapping(len(shape), filled):
        return f"boxes {_words(clash[0])} and {_words(clash[1])} overlap"
    held, total = sum(box.elements for box in filled), math.prod(shape)
    if held != total:
        return f"the parts hold {held} of {total} elements of {list(shape)}"
    return None


def _overlapping(dims: int, boxes: list[Box]) -> tuple[Box, Box] | None:
    if not dims:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    sweep = max(range(dims), key=lambda dim: len({box.offsets[dim] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[sweep]):
        begin = box.offsets[sweep]
        active = [other for other in active if other.offsets[sweep] + other.sizes[sweep] > begin]
        for other in active:
            if box.overlap(other):
                return other, box
        active.append(box)
    return None


def _words(box: Box) -> str:
    ends = (f"{o}:{o + s}" for o, s in zip(box.offsets, box.sizes, strict=False))
    return f"[{', '.join(ends)}]"
