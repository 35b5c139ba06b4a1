"""A restore as the training loop sees it: every tensor from one step, in place, or an error.

Three stages, and nothing of the state is touched before the last:
1. The checkpoint's table of contents is held against the state: names, types, shapes. What does not
   fit is listed, all of it.
2. The uploader fetches and verifies every byte this rank needs, into memory of its own.
3. The tensors are filled from there; then plain values and objects get theirs.

The state says what is wanted: a DTensor's local box on this mesh, whatever the world size was when
it was saved. A fresh optimizer has no state yet: the entries that the checkpoint has for it are made
like its parameters, without taking a step (a step would count, and change the parameters).

Only `rank<N>` entries may be missing, where the checkpoint had fewer ranks: they stay as they are.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from perdure.checkpoint.errors import StateError
from perdure.checkpoint.flatten import Flat, rank_of
from perdure.checkpoint.frames import Message
from perdure.checkpoint.leaves import leaf_from_json
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.shards import Part, dtype_name, part_of
from perdure.checkpoint.uploader_client import UploaderClient

_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What came back. `leaves` are all plain values of the checkpoint by path, also those of other
    ranks; `untouched` names the per-rank entries that the checkpoint did not have."""

    step: int
    attempt: str
    leaves: dict[str, object]
    untouched: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, names of tied tensors resolved."""

    point: Point
    world_size: int
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape
    tied: frozenset[str]
    leaves: dict[str, object]

    @classmethod
    def from_message(cls, raw: Message) -> Contents:
        stored = {fqn: (dtype, tuple(shape)) for fqn, (dtype, shape) in raw["tensors"].items()}
        aliases = raw["aliases"]
        return cls(
            point=Point(raw["step"], raw["attempt"]),
            world_size=raw["world_size"],
            tensors=stored | {alias: stored[fqn] for alias, fqn in aliases.items()},
            tied=frozenset(aliases) | frozenset(aliases.values()),
            leaves={path: leaf_from_json(value) for path, value in raw["leaves"].items()},
        )


@dataclass(slots=True)
class _Late:
    """Plain values of an optimizer's state that have no place yet."""

    values: list[tuple[dict[Any, Any], str, object]] = field(default_factory=list)


def restore(client: UploaderClient, flat: Flat, point: Point) -> Restored:
    """Fill the state. Raises StateError (it does not fit) or what made the bytes unusable."""
    raw, _ = client.request({"kind": "open", "point": point._asdict()})
    contents = Contents.from_message(raw)
    late = _Late()
    for path, optimizer in flat.optimizers.items():
        _complete_optimizer(flat, path, optimizer, contents, late)
    parts, untouched = fit(flat, contents)
    wanted = [part for part in parts if part.slot.nbytes]
    reply, fds = client.request(
        {
            "kind": "fetch",
            "point": point._asdict(),
            "wants": [[p.slot.fqn, p.slot.box.offsets, p.slot.box.sizes] for p in wanted],
        }
    )
    try:
        # A private mapping: the image is shared with the node's other ranks.
        image = mmap.mmap(fds[0], reply["size"] or mmap.PAGESIZE, access=mmap.ACCESS_COPY)
    finally:
        os.close(fds[0])
    _fill(wanted, reply["pieces"], image)
    client.request({"kind": "done", "point": point._asdict()})
    for container, key, value in late.values:
        container[key] = value
    flat.put_back(contents.leaves)
    return Restored(
        step=point.step,
        attempt=point.attempt,
        leaves=contents.leaves,
        untouched=tuple(untouched),
    )


def fit(flat: Flat, contents: Contents) -> tuple[list[Part], list[str]]:
    """The parts to fill, and the per-rank entries left alone. Raises StateError with all misfits."""
    parts: list[Part] = []
    untouched: list[str] = []
    problems: list[str] = []

    def absent(path: str, what: str) -> None:
        owner = rank_of(path)
        if owner is not None and owner >= contents.world_size:
            untouched.append(path)
        else:
            problems.append(f"{path}: {what} of the state that the checkpoint does not have")

    for fqn, tensor in flat.tensors.items():
        if fqn not in contents.tensors:
            absent(fqn, "a tensor")
            continue
        dtype, shape = contents.tensors[fqn]
        if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (dtype, shape):
            problems.append(
                f"{fqn}: {dtype} {list(shape)} in the checkpoint, "
                f"{dtype_name(tensor.dtype)} {list(tensor.shape)} in the state"
            )
        elif (part := part_of(fqn, tensor)) is not None:
            parts.append(part)
    for path in flat.leaves:
        if path not in contents.leaves:
            absent(path, "a value")
    for fqn in contents.tensors:
        if fqn not in flat.tensors and rank_of(fqn) is None and fqn not in contents.tied:
            problems.append(f"{fqn}: a tensor of the checkpoint that the state does not have")
    if problems:
        shown = problems[:_PROBLEMS_SHOWN]
        if more := len(problems) - len(shown):
            shown.append(f"... and {more} more")
        raise StateError(
            f"the state does not fit {contents.point}; nothing was changed:\n  "
            + "\n  ".join(shown),
            hint="build the same model and optimizer as the run that saved it, and give the "
            "optimizer itself, not its state_dict(): a fresh one is completed from the checkpoint",
        )
    return parts, untouched


def _complete_optimizer(
    flat: Flat, path: str, optimizer: torch.optim.Optimizer, contents: Contents, late: _Late
) -> None:
    """Make the entries of `optimizer`'s state that the checkpoint has and a fresh one lacks."""
    top = f"{path}.state" if path else "state"
    if flat.leaves.get(top) == {} and top not in contents.leaves:
        del flat.leaves[top]  # empty as yet: a place for entries, no value of its own
    state = flat.state_of(path)
    params = {
        index: param
        for packed, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
        for index, param in zip(packed["params"], group["params"], strict=True)
    }
    below = f"{top}."
    for fqn, (dtype, shape) in contents.tensors.items():
        if not fqn.startswith(below) or fqn in flat.tensors:
            continue
        index, key = _entry(fqn.removeprefix(below))
        if index not in params:
            continue  # reported by `fit`: the checkpoint has more parameters
        fresh = _like(params[index], getattr(torch, dtype), shape)
        state["state"].setdefault(index, {})[key] = fresh
        flat.add_tensor(fqn, fresh)
    for leaf, value in contents.leaves.items():
        if leaf.startswith(below) and leaf not in flat.leaves:
            index, key = _entry(leaf.removeprefix(below))
            late.values.append((state["state"].setdefault(index, {}), key, value))


def _entry(name: str) -> tuple[int, str]:
    index, _, key = name.partition(".")
    return (int(index) if index.isdigit() else -1), key


def _like(param: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Memory for an entry of the state: placed as its parameter where it has its shape."""
    if tuple(param.shape) == shape:
        return torch.empty_like(param.detach(), dtype=dtype)
    # A count or a factor: `load_state_dict` moves a `step` to where the optimizer wants it.
    device = param.device if shape else torch.device("cpu")
    return torch.empty(shape, dtype=dtype, device=device)


@torch.no_grad()
def _fill(wanted: list[Part], pieces: list[list[Message]], image: mmap.mmap) -> None:
    raw = torch.frombuffer(image, dtype=torch.uint8)
    for part, found in zip(wanted, pieces, strict=True):
        for piece in found:
            source = _chunk(raw, piece, part.local.dtype)
            source = source[_slices(piece["box"], piece["chunk"][0])]
            target = part.local[_slices(piece["box"], part.slot.box.offsets)]
            target.copy_(source)


def _chunk(raw: torch.Tensor, piece: Message, dtype: torch.dtype) -> torch.Tensor:
    """The whole chunk as a tensor in the image; only the piece's box of it holds anything."""
    sizes, at = piece["chunk"][1], piece["at"]
    data = raw[at : at + math.prod(sizes) * dtype.itemsize]
    if at % dtype.itemsize:  # a file of another writer: ours align every tensor
        data = data.clone()
    return data.view(dtype).view(sizes)


def _slices(box: list[list[int]], origin: Any) -> tuple[slice, ...]:
    return tuple(
        slice(begin - start, begin - start + size)
        for begin, size, start in zip(box[0], box[1], origin, strict=True)
    )
