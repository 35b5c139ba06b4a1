"""From this process to a controller on a Ray cluster: begin one, or find one again.

What Ray is told is the spec, which holds no secret. Values of secrets, and the store's credentials
from this environment, go over the run's own wire to the controller once it runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

import perdure
from perdure.checkpoint import errors as checkpoint_errors
from perdure.checkpoint.store import open_store
from perdure.launchers import records
from perdure.launchers.controller_client import ControllerClient
from perdure.launchers.ray_agent import NAMESPACE, controller_name
from perdure.launchers.ray_controller import Controller
from perdure.launchers.ray_nodes import start_here
from perdure.launchers.records import RunRecord
from perdure.runtime import errors
from perdure.runtime.errors import NoPlace, PerdureError, RunProblem, StoreProblem, WireError
from perdure.runtime.opening import ResumeFrom, refuse_if_alive
from perdure.runtime.spec import JobSpec
from perdure.runtime.wire import dial

ACTOR_S = 60.0  # from creating the controller to its first answer: Ray starts a worker for it
LISTEN_S = 120.0  # ... to a driver that listens: it reads the run's folder first
DIAL_S = 5.0
HEAD = "node:__internal_head__"  # Ray's name for a resource that only the head has
_STORE_VARIABLES = ("AWS_", "OBS_")


def submit_ray(
    spec: JobSpec,
    secrets: dict[str, str],
    address: str | None = None,
    *,
    resume: ResumeFrom | None = None,
    store_env: dict[str, str] | None = None,
    say: Callable[[str], None] | None = None,
) -> RunRecord:
    """Begin the run; returns once its controller listens. The record of the run is written.

    `address`: HOST:PORT of the cluster; None or "ray" is the one on this machine, which is started
    when there is none. `store_env`: default AWS_* and OBS_* of this environment.
    Raises NoPlace when there is no such cluster, RunProblem and StoreProblem as the controller does.
    """
    if store_env is None:
        files = spec.store.startswith("file://")
        store_env = {
            k: v for k, v in os.environ.items() if k.startswith(_STORE_VARIABLES) and not files
        }
    found = _connect(address, say or _to_stderr)
    if resume is not None and not resume.takeover:
        # Here, not in the controller: it may take half a minute, and a person should see why.
        refuse_if_alive(open_store(spec.store), known_dead=False, on_wait=resume.on_wait)
        resume = replace(resume, takeover=True)
    controller, place = _begin(spec, resume, found, say or _to_stderr)
    try:
        peer = dial(place["host"], place["port"], place["token"], DIAL_S)
        peer.send({"kind": "secrets", "secrets": secrets, "store_env": store_env})
        with contextlib.closing(peer):
            where = _ask(controller.where.remote(LISTEN_S), LISTEN_S + DIAL_S)
    except (PerdureError, KeyboardInterrupt):
        ray.kill(controller)  # nothing was launched yet: a controller listens before it acts
        raise
    record = RunRecord(
        run=spec.run,
        url=spec.store,
        cluster="ray",
        address=found,
        host=where["host"],
        port=where["port"],
        pid=where["pid"],
        started=time.time(),
        token=where["token"],
        log_dir=spec.log_dir or "",
        cwd=spec.cwd,
    )
    records.write(record)
    return record


def connect_ray(record: RunRecord) -> ControllerClient:
    """The run's controller, wherever it is now. Raises WireError when there is none to be reached."""
    try:
        return ControllerClient(record.host, record.port, record.token, DIAL_S)
    except (WireError, OSError):
        # It was started again, elsewhere or on another port: Ray knows where.
        where = attach(record.run, record.address)
        return ControllerClient(where["host"], where["port"], where["token"], DIAL_S)


def attach(run: str, address: str | None) -> dict[str, Any]:
    """{host, port, token} of the run's controller. Raises WireError when Ray has none.

    Also raises what the controller was ended by, RunProblem or StoreProblem, while it tells so.
    """
    try:
        _connect(address or "auto", _to_stderr)
        controller = ray.get_actor(controller_name(run), namespace=NAMESPACE)
        return _ask(controller.where.remote(DIAL_S), 2 * DIAL_S)
    except (ValueError, NoPlace) as error:
        raise WireError(
            f"the Ray cluster has no controller of {run}: {error}",
            hint="the run may have ended: perdure status tells",
        ) from error


def _connect(address: str | None, say: Callable[[str], None]) -> str:
    """Join the cluster; its address. Idempotent within a process."""
    if ray.is_initialized():
        return _address()
    wanted = "auto" if address in (None, "ray") else address
    try:
        _init(wanted)
    except ConnectionError as error:
        if address not in (None, "ray"):
            raise NoPlace(
                f"no Ray cluster answers at {address}: {_first_line(error)}",
                hint="run this on a node of the cluster; `ray status` there must work",
            ) from error
        started = start_here()
        say(f"no Ray cluster was running here: started one at {started} (`ray stop` ends it)")
        _init(started)
    return _address()


def _address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def _init(address: str | None, runtime_env: dict[str, Any] | None = None) -> None:
    ray.init(
        address=address,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env=runtime_env,
    )


def _begin(
    spec: JobSpec, resume: ResumeFrom | None, address: str, say: Callable[[str], None]
) -> tuple[Any, dict[str, Any]]:
    """A controller that waits for the credentials, and where it does.

    It runs the perdure that is installed on the nodes if it is this version, else a copy of ours.
    """
    controller = _create(spec, resume)
    try:
        place = _ask(controller.intake.remote(), ACTOR_S)
        if place["version"] == perdure.__version__:
            return controller, place
        say(f"the cluster has perdure {place['version']}: this one's code is sent along")
        ray.kill(controller)
        _wait_until_forgotten(controller_name(spec.run))
    except _NotInstalled:
        say("perdure is not installed on the nodes of this cluster: its code is sent along")
    ray.shutdown()  # a module can be sent along only with a connection, as a whole
    _init(address, {"py_modules": [perdure]})
    controller = _create(spec, resume)
    return controller, _ask(controller.intake.remote(), ACTOR_S)


def _wait_until_forgotten(name: str) -> None:
    """Ray keeps the name of a killed actor for a moment."""
    end = time.monotonic() + DIAL_S
    while time.monotonic() < end:
        try:
            ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return
        time.sleep(0.05)


class _NotInstalled(NoPlace):
    """The worker that Ray started cannot import perdure."""


def _create(spec: JobSpec, resume: ResumeFrom | None) -> Any:
    """The controller's actor, beside Ray's control store: the loss of that ends the cluster anyway,
    and a controller on any other node would be missed for the 15 s that Ray needs to see it dead.

    By the head's own resource: Ray does not hold a soft affinity of an actor without resources.
    """
    options: dict[str, Any] = {
        "name": controller_name(spec.run),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": 8,
        "num_cpus": 0,
    }
    if HEAD in ray.cluster_resources():  # type: ignore[no-untyped-call]
        options["resources"] = {HEAD: 0.001}
    back = None
    if resume is not None:
        back = {"step": resume.step, "takeover": resume.takeover}
    try:
        return ray.remote(Controller).options(**options).remote(spec.to_json(), back)
    except ValueError as error:
        raise RunProblem(
            f"{spec.run} has a controller on this cluster already",
            hint=f"see it with `perdure status {spec.run}`, or stop it first",
        ) from error


def _ask(reference: Any, timeout_s: float) -> dict[str, Any]:
    """An answer of the controller, with its refusals as the errors that they were."""
    try:
        answer: dict[str, Any] = ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        raise NoPlace(
            f"the controller did not answer within {timeout_s:.0f} s",
            hint="does the cluster have a node that can start another process? `ray status`",
        ) from error
    except RayError as error:
        words = str(error)
        if "No module named 'perdure'" in words:
            raise _NotInstalled(
                "perdure is not installed on the nodes of this Ray cluster",
                hint="install the same version there, in the environment that Ray runs in",
            ) from error
        last = [line for line in words.splitlines() if line.strip()][-1].strip()
        raise NoPlace(f"the controller failed: {last}", hint="see Ray's logs of it") from error
    if "error" in answer:
        kinds = {k.__name__: k for k in (RunProblem, StoreProblem, NoPlace, errors.UsageError)}
        kind = kinds.get(answer["kind"])
        if (
            kind is None
        ):  # the checkpoint folder has a tree of its own: its problems are the store's
            assert hasattr(checkpoint_errors, answer["kind"]), answer["kind"]
            kind = StoreProblem
        raise kind(answer["error"], hint=answer["hint"])
    return answer


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _to_stderr(text: str) -> None:
    print(f"perdure: {text}", file=sys.stderr, flush=True)
