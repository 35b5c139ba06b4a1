"""What is known of a rank's end, made into an ExitReport.

The first-hand facts are the wait status and the kernel's count of out-of-memory kills in our cgroup;
the rest is read from the error file that the worker (or the script's own @record) left behind. A
file that is not there or not whole makes a report without a traceback, never an error here: the exit
itself is the fact that matters.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
import time
from pathlib import Path

from perdure.runtime.core.events import ExitReport

_FRAME = re.compile(
    r'^  File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>.+)$', re.MULTILINE
)
_TRACEBACK_CHARS_MAX = 20_000
_ERROR_CHARS_MAX = 2_000
_LIBRARIES = tuple(
    os.path.join(path, "") for path in {*sysconfig.get_paths().values()} if "lib" in path
)


def report(
    *, rank: int, node: str, status: int, by_us: bool, error_file: str, oom: bool
) -> ExitReport:
    code = os.waitstatus_to_exitcode(status)
    error, where, trace = (None, None, None) if code == 0 else read_error_file(error_file)
    return ExitReport(
        rank=rank,
        node=node,
        at_s=time.time(),
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        by_us=by_us and code != 0,
        oom=oom and code == -9 and not by_us,
        error=error,
        where=where,
        traceback=trace,
    )


def read_error_file(path: str) -> tuple[str | None, str | None, str | None]:
    """(last line, innermost frame of the script, whole text), each None where it is not known."""
    try:
        raw = json.loads(Path(path).read_bytes())
        message = raw["message"]
        if isinstance(message, str):
            return message[:_ERROR_CHARS_MAX], None, None
        error = str(message["message"])[:_ERROR_CHARS_MAX]
        trace = str(message.get("extraInfo", {}).get("py_callstack", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None, None
    return error, innermost(trace), trace[-_TRACEBACK_CHARS_MAX:] or None


def innermost(trace: str) -> str | None:
    """ "train.py:31 in main": the last frame that is not a library's, else the last one."""
    frames = list(_FRAME.finditer(trace))
    own = [
        frame
        for frame in frames
        if not frame["file"].startswith((*_LIBRARIES, "<")) and "site-packages" not in frame["file"]
    ]
    if not frames:
        return None
    frame = (own or frames)[-1]
    return f"{os.path.basename(frame['file'])}:{frame['line']} in {frame['name']}"


class OomCounter:
    """The kernel's out-of-memory kills in this process's cgroup: did the count rise since last asked?"""

    def __init__(self) -> None:
        self._file = _oom_file()
        self._seen = self._read()

    def rose(self) -> bool:
        before, self._seen = self._seen, self._read()
        return self._seen > before

    def _read(self) -> int:
        if self._file is None:
            return 0
        try:
            text = self._file.read_text()
        except OSError:
            return 0
        match = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        return int(match[1]) if match else 0


def _oom_file() -> Path | None:
    """memory.events of cgroup 2, or memory.oom_control of cgroup 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    root = Path("/sys/fs/cgroup")
    for line in lines:
        _, controllers, path = line.split(":", 2)
        relative = path.lstrip("/")
        places = {
            "": (root / relative / "memory.events", root / "memory.events"),
            "memory": (
                root / "memory" / relative / "memory.oom_control",
                root / "memory" / "memory.oom_control",
            ),
        }.get(controllers, ())
        for place in places:
            if place.is_file():
                return place
    return None
