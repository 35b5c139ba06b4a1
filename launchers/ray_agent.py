"""The actor that anchors one agent to one Ray node: it holds the cards and starts the warden.

Ray places and starts, nothing more. The actor reserves the node's cards for as long as it lives,
starts warden and agent as a session of their own, and then only tells where the agent answers.
Commands and beats never go through it, and training outlives it: a raylet that dies takes no rank
with it. It is detached, so that it outlives every controller and is found again by name.

The run's token comes as the argument of a call, never of the actor's creation, which Ray keeps. Who
can call this actor can run any code on the cluster, so Ray itself is no boundary against them.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import perdure
from perdure.launchers.ray_places import Need, RayNode, node_label
from perdure.runtime.agent_start import start_agent
from perdure.runtime.errors import NoPlace
from perdure.runtime.spec import JobSpec

NAMESPACE = "perdure"
STOP_S = 8.0  # from asking a warden to end to SIGKILL


def new_token() -> str:
    return secrets.token_hex(32)


def agent_prefix(run: str) -> str:
    return f"perdure-agent-{run}-"


def controller_name(run: str) -> str:
    return f"perdure-controller-{run}"


def alive_nodes() -> list[RayNode]:
    """Blocks on Ray's control store: only for a thread that may wait."""
    from ray._private.state import available_resources_per_node  # Ray's own libraries use it too

    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return [
        RayNode(
            node_id=raw["NodeID"],
            name=node_label(raw.get("NodeName") or raw["NodeManagerAddress"], raw["NodeID"]),
            free=free.get(raw["NodeID"], {}),
            total=raw["Resources"],
        )
        for raw in ray.nodes()  # type: ignore[no-untyped-call]
        if raw["Alive"]
    ]


def actor_options(spec: JobSpec, node: RayNode) -> dict[str, Any]:
    need = Need.of(spec)
    return {
        "name": agent_prefix(spec.run) + node.name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,  # a second start is a decision, and deciding is not Ray's
        "max_task_retries": 0,
        "max_concurrency": 8,
        "num_cpus": need.count if need.kind == "CPU" else 0,
        "num_gpus": need.count if need.kind == "GPU" else 0,
        "resources": {"NPU": need.count} if need.kind == "NPU" else {},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False),
    }


class AgentAnchor:
    """Runs on the node. Every method may be called at the same time as any other."""

    def __init__(self, run: str, node: str, slots: int, warm: bool) -> None:
        self._run, self._node, self._slots, self._warm = run, node, slots, warm
        self._lock = threading.Lock()
        self._warden: subprocess.Popen[bytes] | None = None
        self._where: dict[str, Any] | None = None

    def start(self, token: str, version: str) -> dict[str, Any]:
        """Start the agent, once; returns where it answers."""
        with self._lock:
            if self._where is None:
                if version != perdure.__version__:
                    raise RuntimeError(
                        f"{self._node} has perdure {perdure.__version__}, the controller has "
                        f"{version}: install the same version on every node"
                    )
                self._start(token)
            return self.where()

    def _start(self, token: str) -> None:
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        folder = Path(tempfile.gettempdir(), f"perdure-{os.getuid()}", self._run, self._node)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        started = start_agent(
            run=self._run,
            token=token,
            node=self._node,
            host=host,
            slots=self._slots,
            state_dir=str(folder),
            warm=self._warm,
            env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        )
        self._warden = started.process
        try:
            port = started.port
        except NoPlace as error:  # it has to travel through Ray, which knows none of our errors
            raise RuntimeError(f"{error} ({folder}/agent.log on {host})") from None
        self._where = {
            "run": self._run,
            "node": self._node,
            "host": host,
            "port": port,
            "slots": self._slots,
            "token": token,
        }

    def where(self) -> dict[str, Any]:
        """Raises RuntimeError before `start`."""
        if self._where is None:
            raise RuntimeError("the agent was never started")
        return self._where

    def ended(self) -> str:
        """Returns when the agent is gone, with the reason: a call that is left hanging."""
        assert self._warden is not None, "asked only after start"
        code = self._warden.wait()
        return "its agent ended" if code == 0 else f"its agent died (warden's exit code {code})"

    def stop(self) -> None:
        """Returns when the agent and all that it started are gone."""
        if self._warden is None or self._warden.poll() is not None:
            return
        self._warden.terminate()
        try:
            self._warden.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._warden.kill()  # its agent sees that, sweeps and ends
            self._warden.wait()
