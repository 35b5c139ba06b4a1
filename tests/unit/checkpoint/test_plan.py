"""Who writes and who reads which bytes, checked against numpy slices and plain safetensors."""

from __future__ import annotations

import itertools
import json
from random import Random

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.checkpoint.boxes import Box, whole
from perdure.checkpoint.errors import StateError
from perdure.checkpoint.manifest import Chunk
from perdure.checkpoint.plan import Slot, Span, assign_writers, fetches, file_image, reads


def part(array: numpy.ndarray, box: Box) -> numpy.ndarray:
    spans = (slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
    return array[tuple(spans)]


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, n)) for n in shape)
    sizes = tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
    return Box(offsets, sizes)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_spans_one_after_the_other_are_the_box_in_c_order(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    dtype = data.draw(st.sampled_from(["uint8", "int16", "float32", "complex128"]))
    tensor = numpy.arange(numpy.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    held, wanted = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    stored = b"before" + part(tensor, held).tobytes() + b"after"
    chunk = Chunk("w", dtype, shape, held, 6, len(stored) - 5)
    shared = wanted.overlap(held)
    found = reads(wanted, [chunk])
    if shared is None:
        assert found == []
        return
    assert [(read.chunk, read.box) for read in found] == [(chunk, shared)]
    got = b"".join(stored[span.begin : span.end] for span in found[0].spans)
    assert got == part(tensor, shared).tobytes()


def test_rows_are_one_span_and_columns_one_a_row() -> None:
    chunk = Chunk("w", "float32", (8, 4), whole((8, 4)), 0, 128)
    assert reads(Box((2, 0), (3, 4)), [chunk])[0].spans == (Span(32, 80),)
    columns = reads(Box((2, 1), (2, 2)), [chunk])[0].spans
    assert columns == (Span(36, 44), Span(52, 60))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 20)), max_size=12),
    st.integers(1, 16),
    st.integers(0, 30),
)
def test_fetches_cover_all_in_whole_blocks_and_once(
    pairs: list[tuple[int, int]], block: int, gap: int
) -> None:
    spans = [Span(begin, begin + length) for begin, length in pairs]
    found = fetches(spans, 119, block=block, gap=gap)
    for fetch in found:
        assert fetch.begin % block == 0
        assert fetch.end % block == 0 or fetch.end == 119
    for one, two in itertools.pairwise(found):
        assert two.begin > one.end + gap
    for span in spans:
        assert any(fetch.begin <= span.begin and span.end <= fetch.end for fetch in found)


@given(
    st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 1000), max_size=30),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_writers_are_the_same_on_every_rank_and_even(
    sizes: dict[str, int], world_size: int, random: Random
) -> None:
    items = list(sizes.items())
    writers = assign_writers(items, world_size)
    random.shuffle(items)
    assert assign_writers(items, world_size) == writers
    assert writers.keys() == sizes.keys()
    loads = [sum(sizes[f] for f in sizes if writers[f] == rank) for rank in range(world_size)]
    assert max(loads) <= sum(loads) / world_size + max(sizes.values(), default=0)


def slot(fqn: str, tensor: torch.Tensor, box: Box | None = None) -> Slot:
    shape = tuple(tensor.shape)
    return Slot(
        fqn=fqn,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=shape,
        box=box or whole(shape),
        itemsize=tensor.element_size(),
    )


def test_the_image_is_a_safetensors_file() -> None:
    tensors = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bits": torch.tensor([True, False, True]),
        "half": torch.arange(7).to(torch.bfloat16),
        "eight": torch.arange(5).to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 4),
        "wide": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "waves": torch.complex(torch.ones(3), torch.zeros(3)),
    }
    image = file_image([slot(name, tensor) for name, tensor in tensors.items()], {"step": "4"})
    assert len(image.header) % 4096 == 0
    data = bytearray(image.data_bytes)
    for chunk in image.chunks:
        raw = tensors[chunk.fqn].contiguous().reshape(-1).view(torch.uint8)
        data[chunk.begin : chunk.end] = bytes(raw.numpy())
        assert chunk.begin % tensors[chunk.fqn].element_size() == 0
    assert image.size == len(image.header) + len(data)
    loaded = safetensors.torch.load(image.header + bytes(data))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        same = loaded[name].view(torch.uint8) if name == "eight" else loaded[name]
        assert torch.equal(same, tensor.view(torch.uint8) if name == "eight" else tensor)
    metadata = json.loads(image.header[8:])["__metadata__"]
    assert metadata == {"format": "pt", "step": "4"}


def test_what_safetensors_cannot_load_lies_as_bytes() -> None:
    wave = Slot(fqn="w", dtype="complex128", shape=(3,), box=whole((3,)), itemsize=16)
    image = file_image([wave])
    assert image.chunks[0].dtype == "complex128"
    loaded = safetensors.torch.load(image.header + bytes(image.data_bytes))
    assert (loaded["w"].dtype, loaded["w"].shape) == (torch.uint8, (48,))


def test_a_part_of_a_tensor_carries_its_offsets_in_its_name() -> None:
    shard = Slot(fqn="w", dtype="float32", shape=(8, 4), box=Box((4, 0), (4, 4)), itemsize=4)
    image = file_image([shard])
    loaded = safetensors.torch.load(image.header + bytes(image.data_bytes))
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {"w@4_0": (4, 4)}


def test_two_tensors_of_one_name_are_refused() -> None:
    one = Slot(fqn="w", dtype="float32", shape=(2,), box=whole((2,)), itemsize=4)
    with pytest.raises(StateError, match="'w'"):
        file_image([one, one])
    with pytest.raises(StateError, match="__metadata__"):
        file_image([Slot(fqn="__metadata__", dtype="int8", shape=(), box=whole(()), itemsize=1)])
