"""The controller as a detached Ray actor: the driver's loop in an actor that Ray starts again.

The driver runs in a thread of the actor's own process, so that there is one process to lose and
losing it is simple: Ray runs the actor again (`max_restarts=-1`, two seconds later, maybe on another
node), and the new incarnation finds the agents by name, takes the next term and adopts the gang.
Nothing has to be told to it: the run's token is with the agents' anchors, the secrets with the
agents, the decisions in the journal.

Credentials come over the wire, never as arguments to Ray, which keeps them. So a first incarnation
opens a socket and waits for whoever submitted the run.

Never: a run that ends because its controller could not reach the store at a restart (it tries again
until it can, and the ranks train on), nor one that is begun twice.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
import traceback
from typing import Any

import ray

import perdure
from perdure.checkpoint.errors import CheckpointError, KeyExists
from perdure.checkpoint.store import Store, open_store
from perdure.launchers.cluster_ray import RayCluster
from perdure.launchers.ray_agent import NAMESPACE, controller_name
from perdure.runtime.cluster import AgentEndpoint
from perdure.runtime.driver import Driver
from perdure.runtime.errors import PerdureError, RunProblem, WireError
from perdure.runtime.journal import term_key
from perdure.runtime.opening import ResumeFrom, prepare
from perdure.runtime.spec import JobSpec
from perdure.runtime.wire import Link, Listener, dial

INTAKE_S = 120.0  # how long a first incarnation waits for the credentials
ASK_S = 5.0  # bound of asking one agent for them
RETRY_S = 5.0  # between two tries of a later incarnation to go on
LINGER_S = 1.0  # after the end, so that whoever watches hears of it; the journal has it anyway
REFUSED_LINGER_S = 20.0  # after a refusal, of which only we can tell


class Controller:
    """Runs on any node. Its methods answer while the driver runs in the other thread."""

    def __init__(self, spec_json: str, resume: dict[str, Any] | None) -> None:
        self._spec = JobSpec.from_json(spec_json)
        self._resume = ResumeFrom(**resume) if resume is not None else None
        self._again = ray.get_runtime_context().was_current_actor_reconstructed
        self._host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._cluster = RayCluster(self._spec)
        self._listening = threading.Event()
        self._intake: Listener | None = None
        self._where: dict[str, Any] = {}
        if not self._again:
            self._intake = Listener(self._cluster.token, host=self._host)
        threading.Thread(target=self._live, name="controller", daemon=True).start()

    def intake(self) -> dict[str, Any]:
        """Where the credentials are awaited, by a `secrets` message. Only before `where`."""
        assert self._intake is not None, "a later incarnation asks the agents"
        return self._answers_at(self._intake.port)

    def where(self, timeout_s: float) -> dict[str, Any]:
        """Where the driver answers: {host, port, token}; or {error, hint, kind} if it never will."""
        if not self._listening.wait(timeout_s):
            raise TimeoutError(f"the controller does not listen after {timeout_s:.0f} s")
        return self._where

    def _answers_at(self, port: int) -> dict[str, Any]:
        return {
            "host": self._host,
            "port": port,
            "token": self._cluster.token,
            "pid": os.getpid(),
            "version": perdure.__version__,
        }

    def _live(self) -> None:
        """The whole life of this incarnation. Ends the process, one way or the other."""
        over = False
        try:
            secrets, store_env = self._credentials()
            while not self._run(secrets, store_env):
                time.sleep(RETRY_S)
            time.sleep(REFUSED_LINGER_S if "error" in self._where else LINGER_S)
            over = True
        finally:
            if not over:  # a fault of ours: the gang trains on, the next incarnation adopts it
                traceback.print_exc(file=sys.stderr)
                sys.stderr.flush()
                time.sleep(RETRY_S)
                os._exit(1)
        ray.kill(ray.get_actor(controller_name(self._spec.run), namespace=NAMESPACE))

    def _credentials(self) -> tuple[dict[str, str], dict[str, str]]:
        """(secrets, the store's environment): from whoever submits, or from the agents."""
        if self._intake is None:
            return self._from_agents()
        try:
            message = _take(self._intake, INTAKE_S)
        finally:
            self._intake.close()
        return message["secrets"], message["store_env"]

    def _from_agents(self) -> tuple[dict[str, str], dict[str, str]]:
        secrets: dict[str, str] = {}
        store_env: dict[str, str] = {}
        for endpoint in self._cluster.poll().agents:
            try:
                welcome = _hello(endpoint, self._spec.run)
            except WireError as error:
                print(f"perdure: {endpoint.node}: {error}", file=sys.stderr, flush=True)
                continue
            secrets |= welcome.get("secrets") or {}
            store_env |= welcome.get("store_env") or {}
        return secrets, store_env

    def _run(self, secrets: dict[str, str], store_env: dict[str, str]) -> bool:
        """True when this run needs no controller here any more; False to try again."""
        os.environ.update(store_env)  # this process is the run's alone
        try:
            store = open_store(self._spec.store)
            # A later incarnation is told by the journal how the first one began.
            opening = prepare(store, resume=None if self._again else self._resume)
            _write_spec(store, self._spec, anew=self._resume is not None)
        except (PerdureError, CheckpointError) as error:
            # Without agents nothing waits for us, and what the store lacks may be the credentials
            # that they would have had.
            if self._again and self._cluster.poll().agents and not isinstance(error, RunProblem):
                print(f"perdure: cannot go on yet: {error}", file=sys.stderr, flush=True)
                return False
            self._refused(error)
            self._cluster.close()
            return True
        driver = Driver(
            self._spec,
            cluster=self._cluster,
            store=store,
            token=self._cluster.token,
            opening=opening,
            secrets=secrets,
            store_env=store_env,
            host=self._host,
        )
        self._where = self._answers_at(driver.address[1])
        self._listening.set()
        try:
            driver.run()
        except (PerdureError, CheckpointError) as error:
            self._refused(error)
            # Superseded: the agents are another controller's now, and stay.
            if not store.exists(term_key(opening.term + 1)):
                self._cluster.close()
        return True

    def _refused(self, error: PerdureError | CheckpointError) -> None:
        kind = type(error).__name__
        self._where = {"error": str(error), "hint": error.hint, "kind": kind}
        self._listening.set()
        print(f"perdure: {error}", file=sys.stderr, flush=True)


def _write_spec(store: Store, spec: JobSpec, *, anew: bool) -> None:
    """What `perdure resume URL` goes on from. A resume may have changed sizes."""
    data = spec.to_json().encode()
    if anew:
        store.put("spec.json", data)
        return
    try:
        store.put("spec.json", data, create=True)
    except KeyExists:
        if store.get("spec.json") != data:
            raise RunProblem(
                f"{spec.run} is in this store already, with another spec",
                hint="give this run another --name, or `perdure resume` that one",
            ) from None


def _take(listener: Listener, timeout_s: float) -> dict[str, Any]:
    """The one `secrets` message that a submitter sends. Raises TimeoutError."""
    end_s = time.monotonic() + timeout_s
    links: list[Link] = []
    try:
        while (left_s := end_s - time.monotonic()) > 0:
            writers = [link for link in links if link.wants_write]
            waited: list[Listener | Link] = [listener, *links]
            readable, writable, _ = select.select(waited, writers, [], left_s)
            for link in writable:
                link.flush()
            if listener in readable and (new := listener.accept()) is not None:
                links.append(new)
            for link in [link for link in links if link in readable]:
                for message in link.receive():
                    if message["kind"] == "secrets":
                        return message
            links = [link for link in links if link.broken is None]
    finally:
        for link in links:
            link.close()
    raise TimeoutError(f"nobody gave the run's credentials within {timeout_s:.0f} s")


def _hello(endpoint: AgentEndpoint, run: str) -> dict[str, Any]:
    """What an agent says to someone who only asks. Raises WireError."""
    peer = dial(endpoint.host, endpoint.port, endpoint.token, ASK_S)
    try:
        peer.send({"kind": "hello", "run": run, "term": 0})
        answer = peer.receive(ASK_S)
    finally:
        peer.close()
    if answer is None or answer["kind"] != "welcome":
        raise WireError("the agent did not welcome us", hint="is it of another run?")
    return answer
