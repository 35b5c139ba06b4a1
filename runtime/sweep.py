"""Finding and ending processes: those below us, and those that carry our mark.

Two ways, because each alone has a hole. *Descent*: warden and agent are subreapers, so a process that
was orphaned, or moved to another session or group, is still below them; this misses nothing while they
live. *Marks*: `start_agent` puts the run, the node and the agent's own name into the environment that
everything inherits, and /proc shows it; this finds what outlived a warden and an agent that were
killed together.

A mark names one agent of one run of one node: nothing else is ever signalled, and no process of
another user can be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable

RUN_MARK, NODE_MARK, AGENT_MARK = "PERDURE_RUN", "PERDURE_NODE", "PERDURE_AGENT"
_SWEEP_S = 3.0  # a killed process that is not gone by then hangs in the kernel: we say so and leave


def socket_folder(mark: str) -> str:
    """Where an agent's sockets lie: short, because a socket's path has at most 107 bytes."""
    return os.path.join(os.environ.get("TMPDIR", "/tmp"), f"perdure-{os.getuid()}-{mark}")


def remove_sockets(mark: str) -> None:
    """What an agent that was killed could not clean up."""
    folder = socket_folder(mark)
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)


def children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += [int(word) for word in file.read().split()]
    except FileNotFoundError:
        return _children_by_walk(pid) if os.path.exists(f"/proc/{pid}") else []
    except (ProcessLookupError, PermissionError):
        return []
    return found


def _children_by_walk(parent: int) -> list[int]:
    """For kernels without /proc/<pid>/task/<tid>/children."""
    return [pid for pid in _pids() if (stat := _stat(pid)) and int(stat[1]) == parent]


def descendants(pid: int, *, without: frozenset[int] = frozenset()) -> list[int]:
    """All below `pid`, parents before children; those of `without` are left out with all below them."""
    found: list[int] = []
    todo = [pid]
    while todo:
        below = [child for child in children(todo.pop()) if child not in without]
        found += below
        todo += below
    return found


def kill(pids: Iterable[int], how: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


def session_of(pid: int) -> int | None:
    stat = _stat(pid)
    return int(stat[3]) if stat else None


def alive(pid: int) -> bool:
    """Runs, or could run again: a zombie is not alive."""
    stat = _stat(pid)
    return stat is not None and stat[0] not in (b"Z", b"X")


def marked(**marks: str) -> list[int]:
    """Living processes of this user whose environment holds every mark given."""
    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    me = os.getpid()
    return [pid for pid in _pids() if pid != me and wanted <= _environment(pid) and alive(pid)]


def kill_marked(*, spare_agent: str | None = None, **marks: str) -> int:
    """Kill what carries `marks`, but not what `spare_agent` started nor our parent: the warden."""
    count = 0
    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    spared = f"{AGENT_MARK}={spare_agent}".encode()
    for pid in marked(**marks):
        if pid == os.getppid():
            continue
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with os.fdopen(handle):
            # Looked at again under the handle: a number that was taken anew is not ours to kill.
            environment = _environment(pid)
            if wanted <= environment and spared not in environment:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    count += 1
    return count


def kill_descendants(pid: int, *, marked: str | None = None) -> list[int]:
    """SIGKILL for all below `pid` (this process), until none is left. Returns what would not die."""
    end_s = time.monotonic() + _SWEEP_S
    while True:
        below = descendants(pid)
        kill(below)
        if marked:
            kill_marked(**{AGENT_MARK: marked})
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not below:
            return []
        if time.monotonic() > end_s:
            return below
        time.sleep(0.002)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _stat(pid: int) -> list[bytes] | None:
    """Fields of /proc/<pid>/stat from the state on: state, ppid, pgrp, session, ..."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _environment(pid: int) -> set[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return set(file.read().split(b"\0"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()
