"""From the receipts of all writers to the manifest and the commit: a pure function of them.

That it is pure is what makes committing safe without an election. Whoever sees the last receipt
computes the same bytes as anybody else who does; both put them create-only; one wins, and the
other finds its own bytes there. No clock, no host name and no random number may enter.

The layout that the ranks meant is not trusted: parts must tile each tensor exactly, all writers
must agree on what the step is made of, and every object must lie in the store with its full size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from perdure.checkpoint.boxes import Part, Parts, Split, grid_of, tiles_exactly
from perdure.checkpoint.codec import digest, encode
from perdure.checkpoint.errors import StateError
from perdure.checkpoint.manifest import Chunk, Commit, Manifest, ObjectRef, Receipt, Tensor

V = TypeVar("V")
_PER_RANK = "A value that differs between ranks must carry its rank: {'rank3': ...}."


def manifest_of(stored: Sequence[tuple[Receipt, ObjectRef]]) -> Manifest:
    """The manifest of a step, from each writer's receipt. Raises StateError when they do not fit.

    `stored` holds one receipt of every writer, in any order.
    """
    ordered = sorted(stored, key=lambda item: item[0].writer)
    receipts = [receipt for receipt, _ in ordered]
    first = receipts[0]
    name = f"step {first.step} of attempt {first.attempt}"
    if [receipt.writer for receipt in receipts] != list(range(first.writers)):
        raise StateError(f"{name}: receipts of {len(receipts)} of {first.writers} writers")
    for receipt in receipts[1:]:
        _same_save(first, receipt, name)
    tensors = _tensors(receipts, name)
    aliases = _union([receipt.aliases for receipt in receipts], name, "the tied tensor")
    for alias, target in aliases.items():
        if target not in tensors or alias in tensors:
            raise StateError(f"{name}: {alias} is tied to {target}, which is not stored once")
    return Manifest(
        step=first.step,
        attempt=first.attempt,
        parent=first.parent,
        world_size=first.world_size,
        objects=tuple(ref for _, ref in ordered),
        tensors=tensors,
        leaves=_union([receipt.leaves for receipt in receipts], name, "the value"),
        aliases=aliases,
        started_at=min(receipt.started_at for receipt in receipts),
        finished_at=max(receipt.finished_at for receipt in receipts),
    )


def commit_of(manifest: Manifest, key: str) -> Commit:
    """The commit of a manifest that lies under `key`."""
    return Commit(
        step=manifest.step,
        attempt=manifest.attempt,
        parent=manifest.parent,
        manifest=key,
        sha256=digest(encode(manifest)),
        bytes=manifest.bytes,
        world_size=manifest.world_size,
        committed_at=manifest.finished_at,
    )


def _same_save(a: Receipt, b: Receipt, name: str) -> None:
    for field in ("step", "attempt", "parent", "writers", "world_size"):
        if getattr(a, field) != getattr(b, field):
            raise StateError(
                f"{name}: writers {a.writer} and {b.writer} disagree on {field}: "
                f"{getattr(a, field)} and {getattr(b, field)}"
            )
    if a.names != b.names:
        raise StateError(
            f"{name}: ranks {a.writer} and {b.writer} saved states with different names",
            hint=f"Give the same entries to save on every rank. {_PER_RANK}",
        )


def _tensors(receipts: Sequence[Receipt], name: str) -> dict[str, Tensor]:
    held: dict[str, list[tuple[int, Chunk]]] = {}
    for receipt in receipts:
        for chunk in receipt.chunks:
            held.setdefault(chunk.fqn, []).append((receipt.writer, chunk))
    return {fqn: _tensor(f"{name}: {fqn}", held[fqn]) for fqn in sorted(held)}


def _tensor(name: str, chunks: Sequence[tuple[int, Chunk]]) -> Tensor:
    dtype, shape = chunks[0][1].dtype, chunks[0][1].shape
    for writer, chunk in chunks:
        if (chunk.dtype, chunk.shape) != (dtype, shape):
            raise StateError(
                f"{name} is {dtype} {list(shape)} for writer {chunks[0][0]} and "
                f"{chunk.dtype} {list(chunk.shape)} for writer {writer}",
                hint=_PER_RANK,
            )
        if chunk.end < chunk.begin or (chunk.end - chunk.begin) % max(chunk.box.elements, 1):
            raise StateError(f"{name}: writer {writer} holds a part of an impossible length")
    return Tensor(dtype, shape, _split(name, shape, chunks))


def _split(name: str, shape: tuple[int, ...], chunks: Sequence[tuple[int, Chunk]]) -> Split:
    parts = [Part(writer, chunk.box) for writer, chunk in chunks]
    filled = sorted(
        (part for part in parts if part.box.elements), key=lambda part: part.box.offsets
    )
    if grid := grid_of(shape, filled):
        return grid
    if problem := tiles_exactly(shape, [part.box for part in parts]):
        raise StateError(
            f"{name}: {problem}",
            hint="Not all ranks saved their part of it, or two saved the same one.",
        )
    return Parts(tuple(filled))


def _union(tables: Sequence[Mapping[str, V]], name: str, what: str) -> dict[str, V]:
    """All tables in one, sorted. Two writers may give the same name only to the same thing."""
    found: dict[str, V] = {}
    for table in tables:
        for path, value in table.items():
            if path in found and repr(found[path]) != repr(value):  # repr: NaN equals NaN
                raise StateError(f"{name}: {what} {path} differs between writers", hint=_PER_RANK)
            found[path] = value
    return dict(sorted(found.items()))
