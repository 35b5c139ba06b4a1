"""The controller of a job that was submitted on this machine, and the guard that starts it again.

Two detached processes of one program. The *controller* runs the driver. The *guard* does nothing but
wait for the controller's end, and starts another, which takes the next term and adopts what the
agents hold. The controller waits for the guard's end in the same way. So each brings the other back, and
a job is left without both only when both are killed in the same moment; its agents then train on
for their grace, and `perdure resume` goes on from the last checkpoint.

What the next one needs is in the guard's memory (spec and token, never on disk but in this user's
record) and with the agents (secrets). `ended` in the run's state folder says that there is nothing
to bring back: the job's end, or that it may not begin.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from perdure.checkpoint.store import Store
from perdure.launchers import records
from perdure.launchers.cluster_local import CONTROLLER_MARK, LocalCluster, new_token, state_of
from perdure.launchers.records import RunRecord
from perdure.runtime import errors
from perdure.runtime.errors import PerdureError, RunProblem, StoreProblem
from perdure.runtime.opening import Opening, ResumeFrom, prepare
from perdure.runtime.spec import JobSpec

BEGIN_S = 60.0  # a controller reads its store within this, or says why not
RESTARTS_MAX = 10  # of a controller within RESTARTS_WINDOW_S: then it is broken, not killed
RESTARTS_WINDOW_S = 60.0
STORE_RETRY_S = 5.0
_PROGRAM = (
    "import sys; sys.path.pop(0); from perdure.launchers.local_controller import main; main()"
)

Config = dict[str, Any]


def start(
    spec: JobSpec, secrets: dict[str, str], *, resume: ResumeFrom | None, nodes: int
) -> RunRecord:
    """Start guard and controller. Raises what kept the job from beginning."""
    folder = state_of(spec.run)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "ended").unlink(missing_ok=True)
    config: Config = {
        "role": "controller",
        "spec": spec.to_json(),
        "token": new_token(),
        "nodes": nodes,
        "secrets": secrets,
        "resume": None
        if resume is None
        # Whether the run is alive has been judged by now.
        else {"step": resume.step, "takeover": True},
    }
    process = _spawn(config, answers=True)
    assert process.stdout is not None
    with process.stdout as stdout:
        if not select.select([stdout], [], [], BEGIN_S)[0]:
            process.kill()
            raise RunProblem(
                f"the controller gave no sign of life in {BEGIN_S:.0f} s",
                hint=f"its words are in {folder}/controller.log",
            )
        answer = stdout.readline()
    said = json.loads(answer) if answer else {"kind": "RunProblem", "what": "the controller died"}
    if "what" in said:
        kind: type[PerdureError] = getattr(errors, said["kind"], RunProblem)
        hint = said.get("hint") or f"its words are in {folder}/controller.log"
        raise kind(said["what"], hint=hint)
    record = records.read(spec.run)
    assert record is not None, "the controller writes it before it answers"
    process.returncode = 0  # detached: it is not ours to wait for
    return record


def _spawn(config: Config, *, answers: bool = False) -> subprocess.Popen[bytes]:
    """One of the two processes, detached; what it needs goes through stdin."""
    spec = JobSpec.from_json(config["spec"])
    log = os.open(
        state_of(spec.run) / "controller.log",
        os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC,
        0o600,
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", _PROGRAM, config["role"], spec.run],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if answers else subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, CONTROLLER_MARK: spec.run},
            start_new_session=True,
        )
    finally:
        os.close(log)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps(config).encode())
    return process


def main() -> None:
    config: Config = json.load(sys.stdin)
    if config["role"] == "guard":
        _guard(config)
    else:
        _control(config)


def _ended(run: str) -> Path:
    return state_of(run) / "ended"


def _control(config: Config) -> None:
    """Answers one JSON line on stdout when the job has begun, or why it cannot."""
    spec = JobSpec.from_json(config["spec"])
    guarded = threading.Event()  # set: the end is near, no guard is to be started any more
    try:
        exit_code = _drive(config, spec, guarded)
    except PerdureError as error:
        said = {"kind": type(error).__name__, "what": str(error), "hint": error.hint}
        _ended(spec.run).write_text(json.dumps(said))
        print(f"perdure: {error}\n  {error.hint}", file=sys.stderr, flush=True)
        _say(said)
        sys.exit(error.exit_code)
    _ended(spec.run).write_text(json.dumps({"exit_code": exit_code}))


def _drive(config: Config, spec: JobSpec, over: threading.Event) -> int:
    # Here, because the guard never needs them, and it lives as long as the job does.
    from perdure.launchers.job import begin, open_run, record_of
    from perdure.runtime.driver import Driver

    again = config.get("again", False)
    resume = ResumeFrom(**config["resume"]) if config["resume"] is not None else None
    store = open_run(spec.store)
    opening = _prepared_again(store) if again else begin(spec, store, resume)
    cluster = LocalCluster(
        spec.run,
        slots=spec.nproc_per_node,
        token=config["token"],
        owned=False,
        warm=spec.warm,
        nodes=config["nodes"],
        again=True,
        adopt=again,
    )
    driver = Driver(
        spec,
        cluster=cluster,
        store=store,
        token=config["token"],
        opening=opening,
        secrets=config.get("secrets", {}),
    )
    records.write(record_of(spec, driver.address, config["token"]))
    keeper = threading.Thread(target=_keep_guarded, args=(config, over), daemon=True)
    keeper.start()
    _say({"port": driver.address[1], "pid": os.getpid()})
    try:
        return driver.run()
    finally:
        over.set()


def _prepared_again(store: Store) -> Opening:
    """The gang may be training: an outage of the store must not end it, so it is waited for."""
    while True:
        try:
            return prepare(store)
        except StoreProblem as error:
            print(f"perdure: cannot go on yet: {error}", file=sys.stderr, flush=True)
            time.sleep(STORE_RETRY_S)


def _say(answer: dict[str, Any]) -> None:
    """To whoever submits; nobody reads it after a restart, or when the terminal is gone."""
    try:
        print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        sys.stderr.write("perdure: whoever submitted this run is gone\n")


def _keep_guarded(config: Config, over: threading.Event) -> None:
    """Have a guard while the job lives."""
    guard: int | None = config.get("guard")
    while not over.is_set():
        if guard is None:
            mine = {k: v for k, v in config.items() if k not in ("secrets", "guard", "resume")}
            process = _spawn({**mine, "role": "guard", "resume": None, "watched": os.getpid()})
            guard = process.pid
            process.wait()
        else:
            _wait_for_end(guard)
        guard = None
        time.sleep(0.1)


def _guard(config: Config) -> None:
    """Wait for the controller's end, and start the next, until the job has ended."""
    run = JobSpec.from_json(config["spec"]).run
    restarts: list[float] = []
    watched: int = config["watched"]
    process: subprocess.Popen[bytes] | None = None
    while True:
        if process is None:
            _wait_for_end(watched)
        else:
            process.wait()
        if _ended(run).exists():
            return
        now = time.monotonic()
        restarts = [at for at in restarts if at > now - RESTARTS_WINDOW_S] + [now]
        if len(restarts) > RESTARTS_MAX:
            sys.exit(f"perdure: the controller of {run} died {RESTARTS_MAX} times in a minute")
        print(f"perdure: the controller of {run} died; starting it again", file=sys.stderr)
        again = {**config, "role": "controller", "again": True, "guard": os.getpid()}
        process = _spawn(again)


def _wait_for_end(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(handle) as file:
        select.select([file], [], [])
