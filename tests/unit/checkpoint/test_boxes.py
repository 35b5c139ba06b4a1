"""Boxes against a dumb twin that paints every element of the tensor."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.checkpoint.boxes import (
    Box,
    Grid,
    Part,
    Parts,
    all_parts,
    grid_of,
    parts_over,
    tiles_exactly,
    whole,
)

SHAPES = st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple)


def cells(box: Box) -> set[tuple[int, ...]]:
    spans = (range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
    return set(itertools.product(*spans))


def painted_exactly(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """The twin: paint element by element, count the coats."""
    coats = dict.fromkeys(cells(whole(shape)), 0)
    for box in boxes:
        for cell in cells(box):
            if cell not in coats:
                return False
            coats[cell] += 1
    return all(count == 1 for count in coats.values())


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape cut in two again and again: always a tiling."""
    shape = draw(SHAPES)
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        if not shape:
            boxes.append(box)
            continue
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.sizes[dim]))
        low, high = list(box.sizes), list(box.sizes)
        low[dim], high[dim] = cut, box.sizes[dim] - cut
        moved = list(box.offsets)
        moved[dim] += cut
        boxes += [Box(box.offsets, tuple(low)), Box(tuple(moved), tuple(high))]
    return shape, boxes


@st.composite
def any_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """Mostly a tiling with one box moved, resized, dropped or doubled."""
    shape, boxes = draw(tilings())
    if draw(st.booleans()) and shape:
        index = draw(st.integers(0, len(boxes) - 1))
        box = boxes[index]
        nudged = [n + draw(st.integers(-1, 1)) for n in (*box.offsets, *box.sizes)]
        nudged = [max(n, 0) for n in nudged]
        boxes[index] = Box(tuple(nudged[: len(shape)]), tuple(nudged[len(shape) :]))
    if draw(st.booleans()):
        boxes.pop(draw(st.integers(0, len(boxes) - 1)))
    if boxes and draw(st.booleans()):
        boxes.append(draw(st.sampled_from(boxes)))
    return shape, boxes


@settings(max_examples=100, deadline=None)
@given(any_boxes())
def test_tiling_agrees_with_painting(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    assert (tiles_exactly(shape, boxes) is None) == painted_exactly(shape, boxes)


@settings(max_examples=100, deadline=None)
@given(tilings(), st.data())
def test_overlap_agrees_with_sets(
    case: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    a, b = data.draw(st.sampled_from(case[1])), data.draw(st.sampled_from(case[1]))
    shared = a.overlap(b)
    assert (cells(shared) if shared else set()) == cells(a) & cells(b)


@settings(max_examples=100, deadline=None)
@given(tilings(), st.data())
def test_a_grid_is_found_only_where_it_gives_back_the_boxes(
    case: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = case
    parts = [Part(writer, box) for writer, box in enumerate(boxes) if box.elements]
    grid = grid_of(shape, parts)
    split = grid or Parts(tuple(parts))
    if grid:
        assert sorted(all_parts(shape, grid), key=repr) == sorted(parts, key=repr)
    wanted = data.draw(st.sampled_from(boxes))
    found = list(parts_over(shape, split, wanted))
    assert sorted(found, key=repr) == sorted(
        (part for part in parts if part.box.overlap(wanted)), key=repr
    )


def test_even_shards_are_a_grid() -> None:
    # torch.chunk(10 rows, 4) gives 3, 3, 3, 1.
    rows = [Part(rank, Box((3 * rank, 0), (min(3, 10 - 3 * rank), 4))) for rank in range(4)]
    assert grid_of((10, 4), rows) == Grid((3, 4), 0, (1, 0))
    # Two dimensions: tensor-parallel columns within data-parallel rows, rank = 2 * row + column.
    mesh = [
        Part(2 * i + j, Box((4 * i, 2 * j), (4, 2)))
        for i, j in itertools.product(range(2), repeat=2)
    ]
    assert grid_of((8, 4), mesh) == Grid((4, 2), 0, (2, 1))
    # One writer of all, and a scalar.
    assert grid_of((8, 4), [Part(3, whole((8, 4)))]) == Grid((8, 4), 3, (0, 0))
    assert grid_of((), [Part(2, whole(()))]) == Grid((), 2, ())


def test_uneven_shards_are_no_grid() -> None:
    parts = [Part(0, Box((0,), (3,))), Part(1, Box((3,), (4,))), Part(2, Box((7,), (3,)))]
    assert grid_of((10,), parts) is None
    swapped = [Part(1, Box((0,), (5,))), Part(0, Box((5,), (5,)))]
    assert grid_of((10,), swapped) == Grid((5,), 1, (-1,))


def test_problems_are_said_in_words() -> None:
    assert "hold 8 of 10 elements" in (tiles_exactly((10,), [Box((0,), (8,))]) or "")
    halves = [Box((0,), (6,)), Box((5,), (5,))]
    assert tiles_exactly((10,), halves) == "boxes [0:6] and [5:10] overlap"
    assert "reaches out of [10]" in (tiles_exactly((10,), [Box((4,), (8,))]) or "")
    assert "dimensions" in (tiles_exactly((10,), [Box((4, 1), (8, 1))]) or "")
    assert "negative" in (tiles_exactly((10,), [Box((-1,), (8,))]) or "")


def test_many_column_shards_are_swept_along_the_right_dimension() -> None:
    """Quadratic would be 4 million comparisons; the sweep makes none that it need not."""
    boxes = [Box((0, 2 * rank), (64, 2)) for rank in range(2048)]
    assert tiles_exactly((64, 4096), boxes) is None
    assert math.prod((64, 4096)) == sum(box.elements for box in boxes)
