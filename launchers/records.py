"""What this machine remembers of the runs it started: where the folder is, how the controller is reached.

`$PERDURE_HOME/runs/<run>.json`, for this user only, because it holds the run's token. A record is a
convenience: everything a run needs to go on is in its folder in the store. A record that cannot be
read is as good as none, and is said to be so, not guessed at.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

from perdure.runtime.errors import RunProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    run: str
    url: str  # of the run's folder
    cluster: str  # "local" or "ray"
    address: str | None  # of the Ray cluster
    host: str  # where the controller answers
    port: int
    pid: int  # of the controller (local), to be trusted together with `started` only
    started: float  # when that process began: seconds since the epoch, as the system keeps it
    token: str = field(repr=False)
    log_dir: str
    cwd: str


def home(environ: Mapping[str, str] = os.environ) -> str:
    """Where this machine keeps runs that have no other store, their logs, and these records."""
    state = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return environ.get("PERDURE_HOME") or os.path.join(state, "perdure")


def write(record: RunRecord) -> None:
    """Whole or not at all, readable by this user alone."""
    folder = _folder()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=folder, prefix=f".{record.run}-")  # 0600 from the start
    try:
        with os.fdopen(fd, "w") as file:
            json.dump(asdict(record), file)
        os.replace(name, _path(record.run))
    except BaseException:
        os.unlink(name)
        raise


def read(run: str) -> RunRecord | None:
    """None when this machine has no record of it. Raises RunProblem when the record is unreadable."""
    try:
        with open(_path(run), encoding="utf-8") as file:
            raw: dict[str, Any] = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(run, str(error)) from error
    hints = get_type_hints(RunRecord)
    if not isinstance(raw, dict) or (missing := set(hints) - set(raw)):
        what = "it is no object" if not isinstance(raw, dict) else f"it lacks {sorted(missing)}"
        raise _unreadable(run, what)
    return RunRecord(**{name: raw[name] for name in hints})


def list_runs() -> list[RunRecord]:
    """Newest first. Records that cannot be read are left out: `read` says why of a given one."""
    try:
        names = os.listdir(_folder())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        if name.endswith(".json"):
            try:
                record = read(name.removesuffix(".json"))
            except RunProblem:
                continue
            if record is not None:
                found.append(record)
    return sorted(found, key=lambda record: -record.started)


def _folder() -> str:
    return os.path.join(home(), "runs")


def _path(run: str) -> str:
    return os.path.join(_folder(), f"{os.path.basename(run)}.json")


def _unreadable(run: str, why: str) -> RunProblem:
    return RunProblem(
        f"this machine's record of {run} cannot be read ({_path(run)}): {why}",
        hint="name the run by the URL of its folder, and remove that file",
    )
