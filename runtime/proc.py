"""What the standard library does not offer of Linux's process calls, and starting a child by hand.

Used by the warden, the agent and the zygote, whose start is on the way to the first step of every
job: so it imports nothing but ctypes and os, and children are made with fork and exec here instead
of by `subprocess`, which cannot arm a parent-death signal without a preexec function either.

Fork is safe in these processes because each of them has one thread; `fork` asserts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Mapping, Sequence
from typing import NoReturn

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int | bytes) -> None:
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def become_subreaper() -> None:
    """Orphans below this process become its children, and not those of pid 1."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, how: signal.Signals = signal.SIGKILL) -> None:
    """`how` is sent to this process once `parent` is dead; leaves at once if it already is."""
    _prctl(_PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:
        os._exit(1)


def set_name(name: str) -> None:
    """What `ps -o comm` and `top` show, at most 15 bytes."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def fork() -> int:
    """os.fork, refused where another thread could hold a lock that the child then waits on for ever."""
    if (count := threads()) != 1:
        raise RuntimeError(f"fork with {count} threads")
    return os.fork()


def reset_signals() -> None:
    """The signal state of a fresh Python process: nothing of ours is inherited by a child."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_IGN)
        elif number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        elif signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def close_all_but(keep: frozenset[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(int(name))


def place_fds(wanted: Mapping[int, int]) -> None:
    """Make descriptor `target` a copy of `source` for each pair, inheritable, and close the rest.

    Sources are first moved out of the way of targets, so that any permutation works.
    """
    floor = max([*wanted, 2]) + 1
    moved = {}
    for target, source in wanted.items():
        copy = os.dup(source)
        held = []
        while copy < floor:
            held.append(copy)
            copy = os.dup(source)
        for low in held:
            os.close(low)
        moved[target] = copy
    for target, copy in moved.items():
        os.dup2(copy, target, inheritable=True)
    close_all_but(frozenset(wanted))


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    fds: Mapping[int, int],
    cwd: str | None = None,
    new_session: bool = True,
) -> int:
    """Start a program and return its pid. It dies with this process, and has exactly `fds`.

    An exec that fails ends the child with 127 (126: not allowed) and a line on its stderr, as a
    shell does it.
    """
    parent = os.getpid()
    pid = fork()
    return pid if pid else _exec_child(argv, env, fds, cwd, new_session, parent)


def _exec_child(
    argv: Sequence[str],
    env: Mapping[str, str],
    fds: Mapping[int, int],
    cwd: str | None,
    new_session: bool,
    parent: int,
) -> NoReturn:
    code = 127
    try:
        die_with_parent(parent)
        if new_session:
            os.setsid()
        reset_signals()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it; programs expect it
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        place_fds(fds)
        if cwd is not None:
            os.chdir(cwd)
        os.execvpe(argv[0], list(argv), dict(env))
    except PermissionError as error:
        code = 126
        os.write(2, f"perdure: cannot run {argv[0]}: {error}\n".encode())
    except BaseException as error:  # noqa: BLE001 - nothing may climb into the parent's stack
        os.write(2, f"perdure: cannot run {argv[0]}: {error}\n".encode())
    finally:
        os._exit(code)


def set_command_line(words: Sequence[str]) -> bool:
    """Show `words` in /proc/<pid>/cmdline, in the room that this process's arguments have.

    Returns False and changes nothing if they do not fit. Our own start pads its arguments for this.
    """
    with open("/proc/self/stat", "rb") as stat:
        fields = stat.read().rsplit(b") ", 1)[1].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"\0".join(os.fsencode(word) for word in words) + b"\0"
    if start == 0 or len(text) > end - start:
        return False
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))
    return True


def back_to_normal_priority() -> str | None:
    """Undo an inherited niceness (Ray starts its workers at 15). Returns what could not be done."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice <= 0:
        return None
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    except PermissionError:
        return (
            f"this node's agent was started at niceness {nice} and may not lower it: ranks lose "
            "processor time to everything else here (start the Ray cluster with RAY_worker_niceness=0)"
        )
    return None
