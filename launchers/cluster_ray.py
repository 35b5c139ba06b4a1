"""Nodes of a Ray cluster, one agent on each, behind `runtime/cluster.py`.

All calls into Ray are made by one thread of this class, because any of them may block: on a control
store that is away, on a node that is gone. The driver only reads what that thread found last.

Ray's word that a node died comes after 15 s (killed) or 65 s (silent), and it also comes when only
its raylet died and the ranks train on. So it is a second opinion here: an agent is told as lost
when Ray or its anchor says so *and* its port does not answer. The driver's own beats are faster.

An actor whose processors are taken between our look and Ray's would wait for ever; it is given up
after a bound, and its node is left alone for a while. Never: two agents of a run on one node.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

import perdure
from perdure.launchers.ray_agent import (
    NAMESPACE,
    STOP_S,
    AgentAnchor,
    actor_options,
    agent_prefix,
    alive_nodes,
    new_token,
)
from perdure.launchers.ray_places import Need, RayNode, places, shortage
from perdure.runtime.cluster import AgentEndpoint, ClusterView
from perdure.runtime.spec import JobSpec

CALL_S = 10.0  # bound of a call to an actor that is up
START_S = 60.0  # from creating an anchor to its agent's port: Ray starts a worker for it
AVOID_S = 30.0  # a node on which an anchor failed to start is not tried again before
SECOND_OPINION_S = 5.0  # between two looks at the port of an agent that Ray has lost
FORGET_S = 2.0
TURN_S = 0.25


@dataclass(slots=True)
class _Anchor:
    """Our side of one anchor actor. `pending` is the call that was left hanging."""

    node: str
    handle: Any
    pending: Any  # ObjectRef of start(), then of ended()
    deadline: float  # of start()
    endpoint: AgentEndpoint | None = None
    asked_again: float = float(
        "-inf"
    )  # when its port was last tried, after Ray had lost the anchor


class RayCluster:
    """The protocol `runtime.cluster.Cluster` on the Ray cluster that this process is connected to.

    `token` opens the run's agents: given by a caller that has one, else taken from the agents that an
    earlier controller of the run left behind, else new.
    """

    def __init__(self, spec: JobSpec, token: str | None = None) -> None:
        self._spec, self._need = spec, Need.of(spec)
        self._count, self._exclude = 0, frozenset[str]()
        self._anchors: dict[str, _Anchor] = {}
        self._avoid: dict[str, tuple[float, str]] = {}  # node: until when, and why
        self._lock = threading.Lock()
        self._told: list[tuple[str, str]] = []
        self._view = ClusterView(agents=(), waiting_for="looking at the Ray cluster")
        self._wake = threading.Event()
        self._closing = False
        self._closed = threading.Event()
        self._remote: Callable[..., Any] = ray.remote(AgentAnchor).options
        self._adopt()
        self.token = token or next(
            (a.endpoint.token for a in self._anchors.values() if a.endpoint), new_token()
        )
        self._publish("")
        self._thread = threading.Thread(target=self._work, name="ray-cluster", daemon=True)
        self._thread.start()

    # What the driver calls: none of it waits for Ray, except close.

    def request(self, count: int, exclude: frozenset[str]) -> None:
        with self._lock:
            self._count, self._exclude = count, exclude
        self._wake.set()

    def poll(self) -> ClusterView:
        with self._lock:
            told, self._told = tuple(self._told), []
            return ClusterView(
                agents=self._view.agents, lost=told, waiting_for=self._view.waiting_for
            )

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._closed.wait(STOP_S + 2.0)

    # The thread.

    def _work(self) -> None:
        while not self._closing:
            try:
                waiting_for = self._turn()
            except RayError as error:
                waiting_for = f"Ray does not answer: {_line(error)}"
            self._publish(waiting_for)
            self._wake.wait(TURN_S)
            self._wake.clear()
        self._end(list(self._anchors.values()))
        self._wait_until_forgotten()
        self._anchors.clear()
        self._publish("")
        self._closed.set()

    def _turn(self) -> str:
        with self._lock:
            count, exclude = self._count, self._exclude
        for anchor in list(self._anchors.values()):
            self._look_at(anchor)
        if unwanted := [a for a in self._anchors.values() if a.node in exclude]:
            self._end(unwanted)
            for anchor in unwanted:
                del self._anchors[anchor.node]
        missing = count - len(self._anchors)
        if missing > 0:
            nodes = alive_nodes()
            left_out = exclude | self._avoided().keys()
            for node in places(nodes, self._need, self._anchors, left_out)[:missing]:
                self._place(node)
        else:
            nodes = []
        return self._waiting_for(count, exclude, nodes)

    def _wait_until_forgotten(self) -> None:
        """Ray knows a killed actor for a moment longer, and whoever comes next would adopt it."""
        ended = {agent_prefix(self._spec.run) + node for node in self._anchors}
        end = time.monotonic() + FORGET_S
        while ended & set(self._names()) and time.monotonic() < end:
            time.sleep(0.05)

    def _names(self) -> list[str]:
        """Of actors that may be this run's: "a" is also the beginning of "a-b"."""
        prefix = agent_prefix(self._spec.run)
        return [
            entry["name"]
            for entry in ray.util.list_named_actors(all_namespaces=True)
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix)
        ]

    def _adopt(self) -> None:
        """Find the agents that an earlier controller of this run left behind."""
        asked: list[tuple[Any, Any]] = []  # handle, reference to its answer
        for name in self._names():
            with contextlib.suppress(ValueError):  # died since it was listed
                handle = ray.get_actor(name, namespace=NAMESPACE)
                asked.append((handle, handle.where.remote()))
        if asked:
            ray.wait([ref for _, ref in asked], num_returns=len(asked), timeout=CALL_S)
        for handle, ref in asked:
            try:
                where: dict[str, Any] = ray.get(ref, timeout=0)
            except (RayError, GetTimeoutError):
                ray.kill(handle)  # never started, or its node is gone: of no use to anyone
                continue
            if where.pop("run") == self._spec.run:
                node = where["node"]
                self._anchors[node] = _Anchor(
                    node=node,
                    handle=handle,
                    pending=handle.ended.remote(),
                    deadline=0.0,
                    endpoint=AgentEndpoint(**where),
                )

    def _look_at(self, anchor: _Anchor) -> None:
        done, _ = ray.wait([anchor.pending], timeout=0)
        if anchor.endpoint is None:
            if done:
                self._started(anchor)
            elif time.monotonic() > anchor.deadline:
                self._give_up(anchor, f"no agent came up there within {START_S:.0f} s")
            return
        if not done:
            return
        try:
            why = str(ray.get(anchor.pending, timeout=0))
        except RayError as error:
            if time.monotonic() < anchor.asked_again + SECOND_OPINION_S:
                return
            anchor.asked_again = time.monotonic()
            if _answers(anchor.endpoint):
                return  # Ray lost its anchor, not its ranks
            why = f"Ray says: {_line(error)}"
        del self._anchors[anchor.node]
        with contextlib.suppress(RayError):
            ray.kill(anchor.handle)  # frees the name and the cards
        with self._lock:
            self._told.append((anchor.node, why))

    def _started(self, anchor: _Anchor) -> None:
        try:
            where = ray.get(anchor.pending, timeout=0)
        except RayError as error:
            self._give_up(anchor, _line(error))
            return
        where.pop("run")
        anchor.endpoint = AgentEndpoint(**where)
        anchor.pending = anchor.handle.ended.remote()

    def _give_up(self, anchor: _Anchor, why: str) -> None:
        del self._anchors[anchor.node]
        self._avoid[anchor.node] = (time.monotonic() + AVOID_S, why)
        self._end([anchor])

    def _place(self, node: RayNode) -> None:
        spec = self._spec
        try:
            handle = self._remote(**actor_options(spec, node)).remote(
                spec.run, node.name, spec.nproc_per_node, spec.warm
            )
        except ValueError:  # the name is taken: an anchor that was killed and not yet forgotten
            self._avoid[node.name] = (time.monotonic() + 1.0, "an earlier agent is still ending")
            return
        self._anchors[node.name] = _Anchor(
            node=node.name,
            handle=handle,
            pending=handle.start.remote(self.token, perdure.__version__),
            deadline=time.monotonic() + START_S,
        )

    def _end(self, anchors: list[_Anchor]) -> None:
        """Agents first, so that nothing is left behind; then the anchors that hold the cards."""
        stops = [anchor.handle.stop.remote() for anchor in anchors if anchor.endpoint]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=STOP_S)
        for anchor in anchors:
            with contextlib.suppress(RayError, ValueError):  # dead already: nothing to end
                ray.kill(anchor.handle)

    def _publish(self, waiting_for: str) -> None:
        agents = tuple(a.endpoint for _, a in sorted(self._anchors.items()) if a.endpoint)
        with self._lock:
            self._view = ClusterView(agents=agents, waiting_for=waiting_for)

    def _waiting_for(self, count: int, exclude: frozenset[str], nodes: list[RayNode]) -> str:
        up = sum(1 for anchor in self._anchors.values() if anchor.endpoint)
        if up >= count:
            return ""
        words = [f"{up} of {count} nodes"]
        if starting := [a.node for a in self._anchors.values() if a.endpoint is None]:
            words.append(f"starting on {', '.join(sorted(starting))}")
        if len(self._anchors) < count:
            words.append(shortage(nodes, self._need, self._anchors, exclude, self._avoided()))
        return "; ".join(words)

    def _avoided(self) -> dict[str, str]:
        now = time.monotonic()
        return {node: why for node, (until, why) in self._avoid.items() if until > now}


def _answers(endpoint: AgentEndpoint) -> bool:
    try:
        socket.create_connection((endpoint.host, endpoint.port), timeout=2.0).close()
    except OSError:
        return False
    return True


def _line(error: BaseException) -> str:
    """The last line of Ray's report says what it was; the rest is where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
