"""What a cluster offers to the driver: nodes, each with an agent that answers on a socket.

A cluster places and starts agents, and says when it knows one to be gone. Nothing else: commands
and beats go over the wire (`wire.py`), never through the cluster. One contract test holds for all
clusters: `tests/integration/test_cluster_contract.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentEndpoint:
    """Where an agent answers, and what opens it."""

    node: str  # stable while the node lives: what is excluded, cordoned and shown
    host: str
    port: int
    slots: int  # ranks this node can hold
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """What the cluster knows now. `lost` is final for an agent incarnation (node, port)."""

    agents: tuple[AgentEndpoint, ...]
    lost: tuple[tuple[str, str], ...] = ()  # (node, why), each told once
    waiting_for: str = ""  # "2 of 3 nodes: no node has 8 free GPUs": shown to the user


class Cluster(Protocol):
    def request(self, count: int, exclude: frozenset[str]) -> None:
        """Ask for `count` agents on as many nodes, none in `exclude`. Returns at once; idempotent.

        Agents already up on nodes that are not excluded count and are kept. Living agents on
        excluded nodes are ended.
        """

    def poll(self) -> ClusterView:
        """The state of things, never blocking for longer than a few milliseconds."""

    def close(self) -> None:
        """End every agent of this run and all that it started; returns when they are gone or after
        10 s. Idempotent. A controller that merely dies closes nothing."""
