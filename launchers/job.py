"""A job on this machine: in the foreground (`run_local`), or on its own (`submit`, a `Job`).

In the foreground this process is the controller, and owns the job: SIGINT, SIGTERM and SIGHUP stop it,
and if it is killed its agents end. A submitted job has a controller process of its own
(`local_controller.py`), and a `Job` is only a way to ask it; when that controller is gone the
answers come from the journal in the run's folder.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

from perdure.checkpoint.errors import CheckpointError, KeyExists
from perdure.checkpoint.store import Store, open_store
from perdure.launchers import records
from perdure.launchers.cluster_local import (
    CONTROLLER_MARK,
    EarlyAgent,
    LocalCluster,
    is_same,
    new_token,
    seconds_of,
    started_ticks,
    ticks_of,
)
from perdure.launchers.controller_client import ControllerClient, connect
from perdure.launchers.records import RunRecord
from perdure.runtime import journal, sweep
from perdure.runtime.driver import Driver, Observer
from perdure.runtime.errors import RunProblem, StoreProblem, WireError
from perdure.runtime.opening import Opening, ResumeFrom, prepare, refuse_if_alive
from perdure.runtime.spec import JobSpec

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
LOOK_S = 0.5
END_S = 10.0


def run_local(
    spec: JobSpec,
    secrets: Mapping[str, str],
    observer: Observer,
    *,
    early: EarlyAgent | None = None,
    resume: ResumeFrom | None = None,
    nodes: int = 1,
) -> int:
    """Run a job to its end; returns its exit code. `nodes`: how many this machine plays.

    Raises RunProblem (exists, alive, taken over) and StoreProblem, before any rank was started.
    """
    token = early.token if early is not None else new_token()
    try:
        store = open_run(spec.store)
        opening = begin(spec, store, resume)
    except BaseException:
        if early is not None:
            early.close()
        raise
    # Only now: it ends what an earlier gang of this run left, and that gang was alive until proved.
    cluster = LocalCluster(
        spec.run,
        slots=spec.nproc_per_node,
        token=token,
        owned=True,
        console=True,
        warm=spec.warm,
        nodes=nodes,
        early=early,
        again=resume is not None,
    )
    try:
        driver = Driver(
            spec,
            cluster=cluster,
            store=store,
            token=token,
            opening=opening,
            secrets=dict(secrets),
            observer=observer,
        )
        records.write(record_of(spec, driver.address, token))
        with _SignalsStop(driver):
            return driver.run()
    finally:
        cluster.close()


def open_run(url: str) -> Store:
    try:
        return open_store(url)
    except CheckpointError as error:
        raise StoreProblem(str(error), hint=error.hint) from error


def begin(spec: JobSpec, store: Store, resume: ResumeFrom | None) -> Opening:
    """The spec into the run's folder, and the term. Raises RunProblem or StoreProblem."""
    try:
        if resume is None:
            try:
                store.put("spec.json", spec.to_json().encode(), create=True)
            except KeyExists as error:
                if store.get("spec.json") != spec.to_json().encode():
                    raise RunProblem(
                        f"a run named {spec.run} exists already in {store.url}",
                        hint=f"go on with it: perdure resume {spec.run}; or choose another --name",
                    ) from error
        if resume is not None:
            if not resume.takeover:
                known_dead = is_known_dead(spec.run, spec.store)
                refuse_if_alive(store, known_dead=known_dead, on_wait=resume.on_wait)
            end_controllers(spec.run, spec.store)
            resume = replace(resume, takeover=True)  # its life has been judged
        opening = prepare(store, resume=resume)
        if resume is not None:
            key = f"journal/spec-{opening.term:06d}.json"
            store.put(key, spec.to_json().encode(), create=True)
    except CheckpointError as error:
        raise StoreProblem(str(error), hint=error.hint) from error
    return opening


def is_known_dead(run: str, url: str) -> bool:
    """Was the run's controller a process of this machine that is gone, and nobody brings it back?"""
    record = _local_record(run, url)
    if record is None or sweep.marked(**{CONTROLLER_MARK: run}):
        return False
    return not is_same(record.pid, ticks_of(record.started))


def end_controllers(run: str, url: str) -> None:
    """End the processes of this machine that hold the run, before a later term is taken.

    Until they found out they would start again what the new controller ends.
    """
    record = _local_record(run, url)
    if record is not None and record.pid != os.getpid():
        sweep.kill([record.pid] if is_same(record.pid, ticks_of(record.started)) else [])
    end_s = time.monotonic() + END_S
    while pids := sweep.marked(**{CONTROLLER_MARK: run}):  # again: they start each other
        if time.monotonic() > end_s:
            raise RunProblem(
                f"processes {pids} hold the run {run} and do not die", hint="end them by hand"
            )
        sweep.kill(pids)
        time.sleep(0.01)


def _local_record(run: str, url: str) -> RunRecord | None:
    record = records.read(run)
    mine = record is not None and record.cluster == "local" and record.url == url
    return record if mine else None


def record_of(spec: JobSpec, address: tuple[str, int], token: str) -> RunRecord:
    """This process as the run's controller."""
    return RunRecord(
        run=spec.run,
        url=spec.store,
        cluster="local",
        address=None,
        host=address[0],
        port=address[1],
        pid=os.getpid(),
        started=seconds_of(started_ticks(os.getpid())),
        token=token,
        log_dir=spec.log_dir or "",
        cwd=spec.cwd,
    )


class _SignalsStop:
    """While inside, the terminal's signals ask the driver to stop; a second SIGINT, at once."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._before: dict[signal.Signals, Any] = {}
        self._interrupts = 0

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._asked)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        self._interrupts += name is signal.SIGINT
        self._driver.ask_stop(name.name, SIGNALS[name], at_once=self._interrupts > 1)


class Job:
    """A submitted job. Any number of them may speak of one run; none of them owns it."""

    def __init__(self, record: RunRecord, *, after: str = "") -> None:
        """`after`: the journal's last segment before this job was resumed: an older end is not ours."""
        self._record, self._after = record, after

    @property
    def run(self) -> str:
        return self._record.run

    @property
    def url(self) -> str:
        return self._record.url

    def status(self) -> dict[str, Any]:
        """The `status` object: from the controller, else the last that the journal holds."""
        try:
            with self._client() as client:
                return client.status()
        except WireError:
            return dict(self._view().status or {})

    def events(self) -> Iterator[dict[str, Any]]:
        """The journal's lines so far, oldest first."""
        return self._view().events()

    def stop(self, *, at_once: bool = False) -> None:
        """Ask for a stop: a save if the script takes one, then SIGTERM. Raises WireError."""
        with self._client() as client:
            client.stop(by="perdure stop", exit_code=0, at_once=at_once)

    def save(self) -> None:
        with self._client() as client:
            client.save(by="perdure save")

    def wait(self, timeout_s: float | None = None) -> int:
        """The job's exit code, once it has ended. Raises TimeoutError.

        A controller that is replaced meanwhile is found again; one that never comes back is only
        noticed by the caller's timeout.
        """
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            view = self._view()
            if view.finished is not None and view.segments[-1] > self._after:
                return view.finished[0]
            if end_s is not None and time.monotonic() > end_s:
                raise TimeoutError(f"{self.run} has not ended after {timeout_s:g} s")
            try:
                with self._client() as client:
                    for status, _lines in client.watch():
                        late = end_s is not None and time.monotonic() > end_s
                        if late or status.get("exit_code") is not None:
                            break
            except WireError:
                time.sleep(LOOK_S)
            else:
                time.sleep(0.05)  # the journal's last segment is on its way

    def _client(self) -> ControllerClient:
        return connect(self._record)

    def _view(self) -> journal.JournalView:
        return journal.read(open_run(self._record.url))


def submit(
    spec: JobSpec,
    secrets: Mapping[str, str] | None = None,
    *,
    resume: ResumeFrom | None = None,
    nodes: int = 1,
) -> Job:
    """Start a job on this machine that goes on without this process. Returns once it has begun.

    Raises RunProblem or StoreProblem when it cannot begin.
    """
    from perdure.launchers.local_controller import start

    if resume is not None and not resume.takeover:
        # Judged here, where somebody can be told that it takes a while.
        known_dead = is_known_dead(spec.run, spec.store)
        refuse_if_alive(open_run(spec.store), known_dead=known_dead, on_wait=resume.on_wait)
    segments = journal.read(open_run(spec.store)).segments if resume is not None else ()
    after = segments[-1] if segments else ""
    return Job(start(spec, dict(secrets or {}), resume=resume, nodes=nodes), after=after)
