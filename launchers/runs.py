"""Which run is meant: a run id that this machine keeps a record of, or the URL of a run's folder.

A record says where the run's folder is and how its controller is reached; the folder says everything
else, and is enough alone. So every command works on a URL from any machine, and on an id where the
run was started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perdure.launchers.options import nearest
from perdure.runtime.errors import RunProblem, StoreProblem, UsageError, WireError
from perdure.runtime.spec import JobSpec

if TYPE_CHECKING:
    from perdure.checkpoint.store import Store
    from perdure.launchers.controller_client import ControllerClient
    from perdure.launchers.records import RunRecord

CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Found:
    run: str
    url: str
    record: RunRecord | None


def find(target: str | None) -> Found:
    """Raises RunProblem for an id without a record; a URL is believed until its folder is opened."""
    from perdure.launchers import records

    if target is None:
        raise UsageError("no run was given", hint="`perdure status` lists the runs started here")
    text = target.rstrip("/")
    if "://" not in text and (os.sep in text or os.path.isfile(os.path.join(text, "spec.json"))):
        text = f"file://{os.path.abspath(os.path.expanduser(text))}"
    if "://" in text:
        run = text.rpartition("/")[2]
        record = records.read(run)
        return Found(run, text, record if record is not None and record.url == text else None)
    record = records.read(text)
    if record is None:
        known = [one.run for one in records.list_runs()]
        raise RunProblem(
            f"no run {text} was started on this machine{nearest(text, known)}",
            hint="`perdure status` lists them; a run from elsewhere is named by its URL, as in "
            "s3://bucket/runs/RUN",
        )
    return Found(record.run, record.url, record)


def open_run(found: Found) -> Store:
    """The run's folder, which must hold a spec."""
    from perdure.checkpoint.errors import CheckpointError
    from perdure.checkpoint.store import open_store

    try:
        store = open_store(found.url)
        there = store.exists("spec.json")
    except CheckpointError as error:
        raise StoreProblem(str(error), hint=error.hint) from error
    if not there:
        raise RunProblem(
            f"there is no run at {found.url}: it holds no spec.json",
            hint="the URL must be that of the run's own folder, <store>/<run id>",
        )
    return store


def read_spec(store: Store) -> JobSpec:
    """The spec as the newest resume left it; spec.json itself never changes."""
    from perdure.checkpoint.errors import CheckpointError

    try:
        resumed = [e.key for e in store.list("journal") if e.key.startswith("journal/spec-")]
        key = max(resumed, default="spec.json")
        return JobSpec.from_json(store.get(key).decode("utf-8", "replace"))
    except CheckpointError as error:
        raise StoreProblem(str(error), hint=error.hint) from error


def connect(found: Found) -> ControllerClient | None:
    """The run's controller, or None when there is none to be reached from here."""
    if found.record is None:
        return None
    from perdure.launchers import controller_client

    try:
        return controller_client.connect(found.record)
    except (WireError, OSError):
        if found.record.cluster == "local" or _has_ended(found):
            return None
    try:  # Ray may have started it again elsewhere; asking Ray takes seconds, so it comes last
        from perdure.launchers.ray_submit import connect_ray

        return connect_ray(found.record)
    except (WireError, OSError):
        return None


def _has_ended(found: Found) -> bool:
    from perdure.runtime import journal

    return journal.read(open_run(found)).finished is not None


def refuse_alive(found: Found) -> None:
    """A controller that answers settles it at once; else the journal is watched later on."""
    client = connect(found)
    if client is None:
        return
    try:
        phase = client.status().get("phase")
    except WireError:
        return  # it ends just now
    finally:
        client.close()
    if phase != "finished":
        raise RunProblem(
            f"run {found.run} is still alive: its controller answers, and it is {phase}",
            hint=f"watch it with `perdure status {found.run}`; to begin anew from a checkpoint, "
            f"`perdure stop {found.run}` first, or --takeover",
        )


def must_connect(found: Found, to_do: str) -> ControllerClient:
    client = connect(found)
    if client is None:
        raise RunProblem(
            f"the controller of {found.run} does not answer, so it cannot be told to {to_do}",
            hint=f"see `perdure status {found.run}`: the run may have ended; one that was started "
            "on another machine is told from there",
        )
    return client
