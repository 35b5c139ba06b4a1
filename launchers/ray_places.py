"""Which nodes of a Ray cluster can take an agent, and in words why others cannot. Pure.

Ray could choose by itself, but not as this needs it: one agent of a run on a node, none on an
excluded node, and a reason that a person can read while the job waits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from perdure.runtime.spec import Device, JobSpec

_RESOURCES: dict[Device, str] = {"cpu": "CPU", "cuda": "GPU", "npu": "NPU"}  # Ray's names


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """One living node of the Ray cluster as it is now."""

    node_id: str
    name: str  # stable while the node lives, and unique: the label and a piece of Ray's id
    free: Mapping[str, float]
    total: Mapping[str, float]


def node_label(node_name: str, node_id: str) -> str:
    """Raylets of one host share its name, and a host that came back is another node to Ray."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', node_name)}-{node_id[:6]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one agent reserves: as many cards, or processors, as it will hold ranks."""

    kind: str
    count: int

    @classmethod
    def of(cls, spec: JobSpec) -> Need:
        return cls(kind=_RESOURCES[spec.device], count=spec.nproc_per_node)

    def fits(self, node: RayNode) -> bool:
        return node.free.get(self.kind, 0.0) >= self.count


def places(
    nodes: Sequence[RayNode], need: Need, taken: Collection[str], excluded: Collection[str]
) -> list[RayNode]:
    """Where an agent can be started now, those with the most free cards first."""
    usable = [n for n in nodes if n.name not in taken and n.name not in excluded and need.fits(n)]
    return sorted(usable, key=lambda n: (-n.free.get(need.kind, 0.0), n.name))


def shortage(
    nodes: Sequence[RayNode],
    need: Need,
    taken: Collection[str],
    excluded: Collection[str],
    avoided: Mapping[str, str],
) -> str:
    """Why there is no place on any further node. `avoided`: names, and what went wrong there."""

    def why(node: RayNode) -> str:
        if node.name in excluded:
            return "excluded"
        if node.name in avoided:
            return avoided[node.name]
        return f"{node.free.get(need.kind, 0):g} of {node.total.get(need.kind, 0):g} free"

    others = [n for n in sorted(nodes, key=lambda n: n.name) if n.name not in taken]
    told = "; ".join(f"{n.name}: {why(n)}" for n in others[:_TOLD_MAX])
    if len(others) > _TOLD_MAX:
        told += f"; and {len(others) - _TOLD_MAX} more"
    return f"no further node has {need.count} free {need.kind}" + (
        f" ({told})" if told else " (the Ray cluster has no other node)"
    )


_TOLD_MAX = 8
