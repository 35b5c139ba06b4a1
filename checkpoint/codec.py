"""The records of `manifest.py` as they lie on storage: JSON, strict in both directions.

A record is one JSON object on one line, `{"kind", "version", ...fields, "seal"}`; `seal` is the
sha256 of the text as it was before the seal was added. A record that is cut short, altered, of
another kind, of a newer version, or with a field too few or too many is refused with FormatError:
guessing is how silent corruption begins. Nothing is ever unpickled.

The text is a function of the record alone (fields in their order, names sorted by whoever builds
the record), so that two who compute the same manifest put the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from perdure.checkpoint.boxes import Box, Grid, Part, Parts, Split
from perdure.checkpoint.errors import FormatError
from perdure.checkpoint.leaves import leaf_from_json, leaf_to_json
from perdure.checkpoint.manifest import (
    AttemptRecord,
    BadMark,
    Chunk,
    Commit,
    Manifest,
    ObjectRef,
    Point,
    Receipt,
    Record,
    Tensor,
    attempt_order,
)

FORMAT_VERSION = 1
R = TypeVar("R", Receipt, Manifest, Commit, AttemptRecord, BadMark)
_SEAL = re.compile(rb'(.+),"seal":"([0-9a-f]{64})"\}\n', re.DOTALL)


def digest(data: bytes) -> str:
    """sha256 in hex: what chains commit, manifest and receipts."""
    return hashlib.sha256(data).hexdigest()


def encode(record: Record) -> bytes:
    """Raises StateError where a leaf holds what cannot be stored."""
    form = _FORMS[type(record)]
    body = {"kind": form.kind, "version": FORMAT_VERSION, **form.to_json(record)}
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return f'{text[:-1]},"seal":"{digest(text.encode())}"}}\n'.encode()


def decode(kind: type[R], data: bytes, key: str) -> R:
    """`key` is for the message. Raises FormatError unless `data` is a whole record of that kind."""
    form = _FORMS[kind]
    sealed = _SEAL.fullmatch(data)
    if not sealed:
        raise FormatError(f"{key} is cut short, or is not a record of a checkpoint")
    text = sealed[1] + b"}"
    if digest(text) != sealed[2].decode():
        raise FormatError(f"{key} was altered: it does not match its own seal")
    try:
        fields = _Fields(json.loads(text))
        found, version = fields.text("kind"), fields.whole("version")
        if found != form.kind:
            raise FormatError(f"a {found} where a {form.kind} belongs")
        if version != FORMAT_VERSION:
            raise FormatError(f"format version {version}: this perdure reads {FORMAT_VERSION}")
        record = form.from_json(fields)
        fields.done()
    except FormatError as error:
        raise FormatError(f"{key}: {error}") from error
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"{key} has a field of the wrong form: {error}") from error
    assert isinstance(record, kind)
    return record


class _Fields:
    """The fields of a JSON object, each taken once and by type."""

    def __init__(self, raw: Any) -> None:
        if not isinstance(raw, dict):
            raise FormatError("not a JSON object")
        self._raw: dict[str, Any] = raw

    def take(self, name: str) -> Any:
        if name not in self._raw:
            raise FormatError(f"the field {name!r} is missing")
        return self._raw.pop(name)

    def done(self) -> None:
        if self._raw:
            raise FormatError(f"unknown fields {sorted(self._raw)}")

    def whole(self, name: str) -> int:
        return _whole(self.take(name), name)

    def seconds(self, name: str) -> float:
        value = self.take(name)
        if type(value) not in (int, float):
            raise FormatError(f"{name!r} is not a number")
        return float(value)

    def text(self, name: str) -> str:
        return _text(self.take(name), name)

    def attempt(self) -> str:
        value = self.text("attempt")
        attempt_order(value)
        return value

    def point(self, name: str) -> Point | None:
        raw = self.take(name)
        if raw is None:
            return None
        inner = _Fields(raw)
        point = Point(inner.whole("step"), inner.attempt())
        inner.done()
        return point

    def items(self, name: str) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list):
            raise FormatError(f"{name!r} is not a list")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.take(name)
        if not isinstance(value, dict):
            raise FormatError(f"{name!r} is not an object")
        return value

    def names(self, name: str) -> dict[str, str]:
        return {key: _text(value, name) for key, value in self.mapping(name).items()}

    def leaves(self) -> dict[str, object]:
        return {path: leaf_from_json(raw) for path, raw in self.mapping("leaves").items()}


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise FormatError(f"{name!r} is not a whole number")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{name!r} is not text")
    return value


def _ints(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise FormatError(f"{name!r} is not a list")
    return tuple(_whole(item, name) for item in value)


def _point(point: Point | None) -> dict[str, object] | None:
    return None if point is None else {"step": point.step, "attempt": point.attempt}


def _leaves(leaves: Mapping[str, object]) -> dict[str, object]:
    return {path: leaf_to_json(value, path) for path, value in leaves.items()}


# Receipts. Digests are one text of 8 hex digits a block: a 2 GiB object has 8192 of them.


def _receipt_to_json(r: Receipt) -> dict[str, object]:
    return {
        "step": r.step,
        "attempt": r.attempt,
        "parent": _point(r.parent),
        "writer": r.writer,
        "writers": r.writers,
        "world_size": r.world_size,
        "key": r.key,
        "size": r.size,
        "data_start": r.data_start,
        "block": r.block,
        "crc32c": "".join(f"{crc:08x}" for crc in r.crc32c),
        "header_crc32c": f"{r.header_crc32c:08x}",
        "chunks": [
            [c.fqn, c.dtype, [*c.shape], [*c.box.offsets], [*c.box.sizes], c.begin, c.end]
            for c in r.chunks
        ],
        "names": r.names,
        "leaves": _leaves(r.leaves),
        "aliases": dict(r.aliases),
        "started_at": r.started_at,
        "finished_at": r.finished_at,
    }


def _receipt_from_json(f: _Fields) -> Receipt:
    crcs = f.text("crc32c")
    receipt = Receipt(
        step=f.whole("step"),
        attempt=f.attempt(),
        parent=f.point("parent"),
        writer=f.whole("writer"),
        writers=f.whole("writers"),
        world_size=f.whole("world_size"),
        key=f.text("key"),
        size=f.whole("size"),
        data_start=f.whole("data_start"),
        block=f.whole("block"),
        crc32c=tuple(int(crcs[i : i + 8], 16) for i in range(0, len(crcs), 8)),
        header_crc32c=int(f.text("header_crc32c"), 16),
        chunks=tuple(_chunk(raw) for raw in f.items("chunks")),
        names=f.text("names"),
        leaves=f.leaves(),
        aliases=f.names("aliases"),
        started_at=f.seconds("started_at"),
        finished_at=f.seconds("finished_at"),
    )
    blocks = -(-(receipt.size - receipt.data_start) // receipt.block)
    if len(receipt.crc32c) != blocks or receipt.writer >= receipt.writers:
        raise FormatError("its digests do not fit its size, or its writer their number")
    if any(not c.begin <= c.end <= receipt.size - receipt.data_start for c in receipt.chunks):
        raise FormatError("a chunk reaches out of its object")
    return receipt


def _chunk(raw: Any) -> Chunk:
    fqn, dtype, shape, offsets, sizes, begin, end = raw
    box = Box(_ints(offsets, "offsets"), _ints(sizes, "sizes"))
    shape = _ints(shape, "shape")
    if not len(shape) == len(box.offsets) == len(box.sizes):
        raise FormatError(f"the box of {fqn!r} has not the dimensions of its tensor")
    begin, end = _whole(begin, "begin"), _whole(end, "end")
    return Chunk(_text(fqn, "fqn"), _text(dtype, "dtype"), shape, box, begin, end)


def _manifest_to_json(m: Manifest) -> dict[str, object]:
    return {
        "step": m.step,
        "attempt": m.attempt,
        "parent": _point(m.parent),
        "world_size": m.world_size,
        "objects": [[o.writer, o.key, o.size, o.receipt, o.sha256] for o in m.objects],
        "tensors": {
            fqn: {"dtype": t.dtype, "shape": [*t.shape], **_split_to_json(t.split)}
            for fqn, t in m.tensors.items()
        },
        "leaves": _leaves(m.leaves),
        "aliases": dict(m.aliases),
        "started_at": m.started_at,
        "finished_at": m.finished_at,
    }


def _split_to_json(split: Split) -> dict[str, object]:
    if isinstance(split, Grid):
        return {"grid": [[*split.cell], split.first, [*split.strides]]}
    return {"parts": [[p.writer, [*p.box.offsets], [*p.box.sizes]] for p in split.parts]}


def _manifest_from_json(f: _Fields) -> Manifest:
    manifest = Manifest(
        step=f.whole("step"),
        attempt=f.attempt(),
        parent=f.point("parent"),
        world_size=f.whole("world_size"),
        objects=tuple(_object(raw) for raw in f.items("objects")),
        tensors={fqn: _tensor(raw) for fqn, raw in f.mapping("tensors").items()},
        leaves=f.leaves(),
        aliases=f.names("aliases"),
        started_at=f.seconds("started_at"),
        finished_at=f.seconds("finished_at"),
    )
    if [ref.writer for ref in manifest.objects] != list(range(len(manifest.objects))):
        raise FormatError("its objects are not those of writers 0, 1, 2, ...")
    return manifest


def _object(raw: Any) -> ObjectRef:
    writer, key, size, receipt, sha256 = raw
    return ObjectRef(
        _whole(writer, "writer"),
        _text(key, "key"),
        _whole(size, "size"),
        _text(receipt, "receipt"),
        _text(sha256, "sha256"),
    )


def _tensor(raw: Any) -> Tensor:
    f = _Fields(raw)
    dtype, shape = f.text("dtype"), _ints(f.take("shape"), "shape")
    if "grid" in raw:
        cell, first, strides = f.items("grid")
        grid = Grid(_ints(cell, "cell"), _whole(first, "first"), tuple(int(s) for s in strides))
        fits = len(grid.cell) == len(grid.strides) == len(shape) and all(
            c > 0 or n == 0 for c, n in zip(grid.cell, shape, strict=True)
        )
        split: Split = grid
    else:
        parts = ((w, Box(_ints(o, "offsets"), _ints(s, "sizes"))) for w, o, s in f.items("parts"))
        held = tuple(Part(_whole(writer, "writer"), box) for writer, box in parts)
        fits = all(len(p.box.offsets) == len(p.box.sizes) == len(shape) for p in held)
        split = Parts(held)
    f.done()
    if not fits:
        raise FormatError("a tensor's boxes have not its dimensions")
    return Tensor(dtype, shape, split)


def _commit_to_json(c: Commit) -> dict[str, object]:
    return {
        "step": c.step,
        "attempt": c.attempt,
        "parent": _point(c.parent),
        "manifest": c.manifest,
        "sha256": c.sha256,
        "bytes": c.bytes,
        "world_size": c.world_size,
        "committed_at": c.committed_at,
    }


def _commit_from_json(f: _Fields) -> Commit:
    return Commit(
        step=f.whole("step"),
        attempt=f.attempt(),
        parent=f.point("parent"),
        manifest=f.text("manifest"),
        sha256=f.text("sha256"),
        bytes=f.whole("bytes"),
        world_size=f.whole("world_size"),
        committed_at=f.seconds("committed_at"),
    )


def _attempt_to_json(a: AttemptRecord) -> dict[str, object]:
    return {"attempt": a.attempt, "parent": _point(a.parent), "nonce": a.nonce}


def _attempt_from_json(f: _Fields) -> AttemptRecord:
    return AttemptRecord(attempt=f.attempt(), parent=f.point("parent"), nonce=f.text("nonce"))


def _bad_to_json(b: BadMark) -> dict[str, object]:
    return {"step": b.step, "attempt": b.attempt, "why": b.why}


def _bad_from_json(f: _Fields) -> BadMark:
    return BadMark(step=f.whole("step"), attempt=f.attempt(), why=f.text("why"))


@dataclass(frozen=True)
class _Form:
    kind: str
    to_json: Callable[[Any], dict[str, object]]
    from_json: Callable[[_Fields], Record]


_FORMS: dict[type[Record], _Form] = {
    Receipt: _Form("receipt", _receipt_to_json, _receipt_from_json),
    Manifest: _Form("manifest", _manifest_to_json, _manifest_from_json),
    Commit: _Form("commit", _commit_to_json, _commit_from_json),
    AttemptRecord: _Form("attempt", _attempt_to_json, _attempt_from_json),
    BadMark: _Form("bad", _bad_to_json, _bad_from_json),
}
