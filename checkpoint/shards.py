"""Which box of which tensor this rank holds, and whether it is the one that writes it.

A plain tensor is whole on every rank and written by one of them, chosen by size alone
(`plan.assign_writers`), so that no rank has to ask another. A DTensor's shard is written by its
holder; of several replicas by the first along every replicated dimension of the mesh. A per-rank
entry (`rank<N>` in its path) is written by that rank.

Tied tensors (the same memory under two names) are stored once, under the name that comes first in
the order of names, which is the same everywhere.

Nothing here talks to anybody, and nothing is copied.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass

import torch

from perdure.checkpoint import plan
from perdure.checkpoint.boxes import Box, whole
from perdure.checkpoint.errors import StateError
from perdure.checkpoint.flatten import Flat, rank_of


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of one tensor: `local` is the live memory of `slot.box`."""

    slot: plan.Slot
    local: torch.Tensor
    first_replica: bool
    sharded: bool  # a DTensor: its holder writes it


@dataclass(frozen=True, slots=True)
class Share:
    """What this rank is to write. `names` digests what every rank must hold alike."""

    parts: tuple[Part, ...]
    aliases: dict[str, str]
    leaves: dict[str, object]
    names: str

    def shape_key(self) -> tuple[object, ...]:
        """Equal for two saves exactly when the same layout of the arena fits both."""
        slots = tuple((p.slot.fqn, p.slot.dtype, p.slot.shape, p.slot.box) for p in self.parts)
        return (slots, tuple(sorted(self.aliases.items())), self.names)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def part_of(fqn: str, tensor: torch.Tensor) -> Part | None:
    """None when this rank holds nothing of it. Raises StateError on what cannot be stored."""
    _storable(fqn, tensor)
    shape = tuple(tensor.shape)
    # Without this module imported by somebody there is no DTensor; importing it costs a second.
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is None or not isinstance(tensor, dtensor):
        slot = plan.Slot(
            fqn=fqn,
            dtype=dtype_name(tensor.dtype),
            shape=shape,
            box=whole(shape),
            itemsize=tensor.itemsize,
        )
        return Part(slot, tensor.detach(), first_replica=True, sharded=False)
    return _dtensor_part(fqn, tensor)


def _dtensor_part(fqn: str, tensor: torch.Tensor) -> Part | None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None  # this rank is not part of the tensor's mesh
    for placement in placements:
        if not (placement.is_replicate() or hasattr(placement, "dim")):
            raise StateError(
                f"{fqn} is a DTensor placed as {placement}",
                hint="only sharded and replicated placements can be stored: redistribute it first",
            )
    with torch.no_grad():
        local = tensor.to_local()
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(local.shape) != tuple(sizes):
        raise StateError(
            f"{fqn}: its local part has the shape {list(local.shape)}, its placements "
            f"{placements} make {list(sizes)}",
            hint="the DTensor was made from a part of another shape: make it by distribute_tensor",
        )
    # A tensor without an element has no shard that stands for it: the first rank does.
    first = all(
        at == 0
        for at, placement in zip(coordinate, placements, strict=True)
        if placement.is_replicate() or 0 in tensor.shape
    )
    slot = plan.Slot(
        fqn=fqn,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        box=Box(tuple(offsets), tuple(sizes)),
        itemsize=tensor.itemsize,
    )
    return Part(slot, local, first_replica=first, sharded=True)


def _storable(fqn: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise StateError(
            f"{fqn} is a tensor of layout {tensor.layout}, quantized: {tensor.is_quantized}",
            hint="only dense tensors can be stored: convert it, or keep it out of the state",
        )
    if tensor.is_meta:
        raise StateError(
            f"{fqn} lies on the meta device: it has no values",
            hint="materialise the model (model.to_empty(device=...)) before save or restore",
        )


def share_of(flat: Flat, rank: int, world_size: int) -> Share:
    """What rank `rank` of `world_size` writes of the state. The same without asking anybody."""
    parts = [p for fqn in sorted(flat.tensors) if (p := part_of(fqn, flat.tensors[fqn]))]
    aliases, stored = _tied(parts)
    common = [p for p in stored if not p.sharded and _owner(p.slot.fqn, world_size) is None]
    writers = plan.assign_writers([(p.slot.fqn, p.slot.nbytes) for p in common], world_size)
    mine = []
    for part in stored:
        fqn = part.slot.fqn
        writer = writers.get(fqn, _owner(fqn, world_size))
        if writer == rank or _writes_shard(part):
            mine.append(part)
    leaves = {
        path: value
        for path, value in flat.leaves.items()
        if rank == (_owner(path, world_size) or 0)
    }
    alike = [f"{p.slot.fqn} {p.slot.dtype} {p.slot.shape}" for p in common]
    alike += [f"{alias} = {fqn}" for alias, fqn in aliases.items()]
    alike += [path for path in flat.leaves if _owner(path, world_size) is None]
    names = hashlib.sha256("\n".join(sorted(alike)).encode()).hexdigest()
    return Share(tuple(mine), aliases, leaves, names)


def _writes_shard(part: Part) -> bool:
    empty = 0 in part.slot.shape
    return part.sharded and part.first_replica and (part.slot.nbytes > 0 or empty)


def _owner(path: str, world_size: int) -> int | None:
    """The rank whose own entry this is; None for entries of all ranks."""
    rank = rank_of(path)
    return rank if rank is not None and rank < world_size else None


def _tied(parts: list[Part]) -> tuple[dict[str, str], list[Part]]:
    """Names that share their memory with an earlier one, and the parts without them."""
    seen: dict[object, str] = {}
    aliases: dict[str, str] = {}
    stored: list[Part] = []
    for part in parts:
        local = part.local
        memory = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride())
        key = (memory, part.slot.shape, part.slot.box)
        shared = local.numel() > 0 and rank_of(part.slot.fqn) is None
        if shared and key in seen:
            aliases[part.slot.fqn] = seen[key]
            continue
        if shared:
            seen[key] = part.slot.fqn
        stored.append(part)
    return aliases, stored
