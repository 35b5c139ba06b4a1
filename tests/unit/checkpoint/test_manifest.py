"""Records on storage: they come back equal, and anything else is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.checkpoint.assembly import commit_of, manifest_of
from perdure.checkpoint.boxes import Box, Grid, Part, Parts, whole
from perdure.checkpoint.codec import FORMAT_VERSION, decode, digest, encode
from perdure.checkpoint.errors import FormatError, StateError
from perdure.checkpoint.manifest import (
    AttemptRecord,
    BadMark,
    Chunk,
    Commit,
    Manifest,
    ObjectRef,
    Point,
    Receipt,
    attempt_order,
)

KIB = 1024


def receipt(writer: int = 0, writers: int = 2, **changed: object) -> Receipt:
    """Half the rows of an 8 x 4 float32 tensor."""
    chunk = Chunk("w", "float32", (8, 4), Box((4 * writer, 0), (4, 4)), 0, 64)
    plain = Receipt(
        step=40,
        attempt="1.2",
        parent=Point(20, "1.1"),
        writer=writer,
        writers=writers,
        key=f"o/w{writer}.safetensors",
        size=4 * KIB + 64,
        data_start=4 * KIB,
        crc32c=(0xDEADBEEF,),
        header_crc32c=7,
        chunks=(chunk,),
        names="abc",
        world_size=2,
        started_at=10.5 - writer,
        finished_at=11.25 + writer,
        leaves={"step": 40, "rng": (1, b"x")} if writer == 0 else {},
        aliases={"tied": "w"},
    )
    return replace(plain, **changed)  # type: ignore[arg-type]


def stored(*receipts: Receipt) -> list[tuple[Receipt, ObjectRef]]:
    return [
        (r, ObjectRef(r.writer, r.key, r.size, f"o/w{r.writer}.receipt.json", digest(encode(r))))
        for r in receipts
    ]


MANIFEST = manifest_of(stored(receipt(0), receipt(1)))
RECORDS = [
    receipt(),
    MANIFEST,
    replace(
        MANIFEST,
        tensors={"w": replace(MANIFEST.tensors["w"], split=Parts((Part(0, whole((8, 4))),)))},
    ),
    commit_of(MANIFEST, "o/manifest.json"),
    AttemptRecord(attempt="3.14", parent=None, nonce="00ff"),
    BadMark(step=40, attempt="1.2", why="block 3 of o/w0: crc32c"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_records_come_back_equal(record: Receipt) -> None:
    data = encode(record)
    assert decode(type(record), data, "key") == record
    assert encode(record) == data
    assert json.loads(data)["version"] == FORMAT_VERSION


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(RECORDS), st.data())
def test_a_record_cut_short_or_altered_anywhere_is_refused(
    record: Receipt, data: st.DataObject
) -> None:
    whole_text = encode(record)
    at = data.draw(st.integers(0, len(whole_text) - 1))
    with pytest.raises(FormatError, match="some/key"):
        decode(type(record), whole_text[:at], "some/key")
    flipped = bytearray(whole_text)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FormatError, match="some/key"):
        decode(type(record), bytes(flipped), "some/key")


def resealed(data: bytes, **changed: object) -> bytes:
    """The record with fields changed (None: taken out) and a seal that fits: not an accident."""
    raw = json.loads(data)
    raw.pop("seal")
    raw.update(changed)
    raw = {name: value for name, value in raw.items() if value != "GONE"}
    text = json.dumps(raw, separators=(",", ":"))
    return f'{text[:-1]},"seal":"{digest(text.encode())}"}}\n'.encode()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": 2}, "format version 2: this perdure reads 1"),
        ({"kind": "manifest"}, "a manifest where a receipt belongs"),
        ({"extra": 1}, "unknown fields"),
        ({"step": "GONE"}, "'step' is missing"),
        ({"step": -1}, "'step' is not a whole number"),
        ({"step": True}, "'step' is not a whole number"),
        ({"attempt": "1"}, "term.counter"),
        ({"crc32c": ""}, "digests do not fit"),
        ({"crc32c": "xxxxxxxx"}, "wrong form"),
        ({"block": 0}, "wrong form"),
        ({"writer": 2}, "writer"),
        ({"chunks": [["w", "float32", [8], [0, 0], [4, 4], 0, 64]]}, "dimensions"),
        ({"chunks": [["w"]]}, "wrong form"),
        ({"chunks": [["w", "float32", [8, 4], [0, 0], [4, 4], 1, 65]]}, "reaches out"),
        ({"chunks": [["w", "float32", [8, 4], [0, 0], [4, 4], 9, 8]]}, "reaches out"),
        ({"leaves": {"x": {"pickle": "gASV"}}}, "unknown form"),
        ({"parent": {"step": 1}}, "'attempt' is missing"),
    ],
)
def test_a_receipt_of_the_wrong_form_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        decode(Receipt, resealed(encode(receipt()), **changed), "key")


def test_a_grid_that_does_not_fit_its_tensor_is_refused() -> None:
    raw = json.loads(encode(MANIFEST))["tensors"]
    for grid in ([[4], 0, [1]], [[4, 0], 0, [1, 0]], [[4, 4], -1, [1, 0]]):
        raw["w"]["grid"] = grid
        with pytest.raises(FormatError):
            decode(Manifest, resealed(encode(MANIFEST), tensors=raw), "key")


def test_the_manifest_is_a_function_of_the_receipts() -> None:
    again = manifest_of(list(reversed(stored(receipt(0), receipt(1)))))
    assert encode(again) == encode(MANIFEST)
    assert MANIFEST.tensors["w"].split == Grid((4, 4), 0, (1, 0))
    assert (MANIFEST.started_at, MANIFEST.finished_at) == (9.5, 12.25)
    assert MANIFEST.leaves == {"rng": (1, b"x"), "step": 40}
    assert MANIFEST.aliases == {"tied": "w"}
    commit = commit_of(MANIFEST, "o/manifest.json")
    assert isinstance(commit, Commit)
    assert (commit.bytes, commit.committed_at) == (2 * (4 * KIB + 64), 12.25)
    assert commit.sha256 == digest(encode(MANIFEST))


def test_a_manifest_does_not_grow_with_tensors_times_writers() -> None:
    def size(writers: int) -> int:
        def one(writer: int) -> Receipt:
            chunks = tuple(
                Chunk(
                    f"t{n}", "float32", (512, 4), Box((rows * writer, 0), (rows, 4)), 0, 16 * rows
                )
                for n in range(50)
            )
            return receipt(writer, writers, chunks=chunks, aliases={}, leaves={})

        rows = 512 // writers
        manifest = manifest_of(stored(*(one(writer) for writer in range(writers))))
        return len(json.dumps(json.loads(encode(manifest))["tensors"]))

    assert size(64) < 1.1 * size(2)


W1 = receipt(1)
CHUNK = W1.chunks[0]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (replace(W1, chunks=()), "hold 16 of 32 elements"),
        (replace(W1, chunks=(replace(CHUNK, box=Box((3, 0), (5, 4))),)), "overlap|length"),
        (replace(W1, chunks=(replace(CHUNK, dtype="int32"),)), "float32 .* int32"),
        (replace(W1, chunks=(replace(CHUNK, shape=(9, 4)),)), r"\[8, 4\].*\[9, 4\]"),
        (replace(W1, chunks=(replace(CHUNK, end=63),)), "impossible length"),
        (replace(W1, names="other"), "different names"),
        (replace(W1, step=41), "disagree on step"),
        (replace(W1, parent=None), "disagree on parent"),
        (replace(W1, leaves={"step": 41}), "the value step differs"),
        (replace(W1, aliases={"tied": "v"}), "tied tensor tied differs"),
        (replace(W1, writer=0), "receipts of 2 of 2 writers"),
    ],
)
def test_receipts_that_do_not_make_a_whole_are_refused(second: Receipt, said: str) -> None:
    with pytest.raises(StateError, match=said):
        manifest_of(stored(receipt(0), second))


def test_an_alias_of_nothing_is_refused() -> None:
    pair = [receipt(writer, aliases={"tied": "gone"}) for writer in range(2)]
    with pytest.raises(StateError, match="tied is tied to gone"):
        manifest_of(stored(*pair))


def test_equal_nan_leaves_of_two_writers_agree() -> None:
    pair = [receipt(writer, leaves={"loss": float("nan")}) for writer in range(2)]
    assert list(manifest_of(stored(*pair)).leaves) == ["loss"]


def test_attempts_are_ordered_as_numbers() -> None:
    assert sorted(["2.1", "1.10", "1.9"], key=attempt_order) == ["1.9", "1.10", "2.1"]
    for wrong in ("1", "1.2.3", "a.b", "1.-2", "", "1.2\n"):
        with pytest.raises(FormatError):
            attempt_order(wrong)
