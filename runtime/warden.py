"""The sweeper above an agent: one tiny process whose only work is that nothing is left behind.

It is the first process of a node and imports next to nothing; it forks the agent before anything
else happens, and then only waits. It is a subreaper: whatever the agent's descendants start, in
whatever session or process group, is below it and stays below it. Three things end the wait:

- the agent ended. With 0 it has swept already; with anything else the warden kills all that is left.
- SIGTERM, or the end of the owner's pipe (a local `run` whose launcher died): the agent is asked to
  leave (SIGTERM), and has SWEEP_AFTER_S for it.
- the warden is killed: the agent's parent-death signal is that same SIGTERM. If both are killed at
  once, the parent-death signals of zygote and ranks (SIGKILL) end them.

It must never read the configuration: the run's token is in it, and the zygote, which ranks are forked
from, is forked from this process's memory by way of the agent.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable

from perdure.runtime import proc, sweep

SWEEP_AFTER_S = 4.0  # with the sweep itself, less than the 5 s in which nothing may be left
_LEFT_BEHIND = 70  # exit code: the agent did not leave by itself


def main(*, warm: bool = True, owner_fd: int | None = None) -> Callable[[], None]:
    """Be a node's warden; in a rank, which is a late child of this call, return what it runs."""
    proc.become_subreaper()
    warden = os.getpid()
    agent = proc.fork()
    if agent == 0:
        if owner_fd is not None:
            os.close(owner_fd)
        return _agent(warm, warden)
    proc.set_name("perdure-warden")
    proc.set_command_line(["perdure-warden", *_marks()])
    code = _watch(agent, owner_fd)
    sys.exit(code)


def _agent(warm: bool, warden: int) -> Callable[[], None]:
    proc.die_with_parent(warden, signal.SIGTERM)
    proc.become_subreaper()  # of the ranks: each sweeps if the other dies
    # The zygote is forked first: it imports torch while the agent imports the rest of itself.
    from perdure.runtime import zygote_link

    link, rank = zygote_link.fork() if warm else (None, None)
    if rank is not None:
        return rank
    from perdure.runtime.agent import main as serve

    sys.exit(serve(link))


def _watch(agent: int, owner_fd: int | None) -> int:
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    asked: list[int] = []
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal's signals are the launcher's business
    os.close(0)
    watched = [wake_read] if owner_fd is None else [wake_read, owner_fd]
    kill_at_s: float | None = None
    while True:
        status = _reap(agent)
        if status is not None:
            return _after(status)
        if asked and kill_at_s is None:
            kill_at_s = time.monotonic() + SWEEP_AFTER_S
            os.kill(agent, signal.SIGTERM)
        left_s = None if kill_at_s is None else kill_at_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            os.kill(agent, signal.SIGKILL)
            kill_at_s = time.monotonic() + SWEEP_AFTER_S
            continue
        ready, _, _ = select.select(watched, [], [], left_s)
        if wake_read in ready:
            os.read(wake_read, 4096)
        if owner_fd in ready:  # nothing is ever written: readable means that the owner is gone
            asked.append(0)
            watched = [wake_read]


def _reap(agent: int) -> int | None:
    """The agent's wait status, once it ended. Orphans that came up to us are reaped on the way."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return _LEFT_BEHIND << 8
        if pid == 0:
            return None
        if pid == agent:
            return status


def _after(status: int) -> int:
    mark = os.environ[sweep.AGENT_MARK]
    left = sweep.kill_descendants(os.getpid(), marked=mark)
    sweep.remove_sockets(mark)
    code = os.waitstatus_to_exitcode(status)
    return 0 if code == 0 and not left else _LEFT_BEHIND if code <= 0 else code


def _marks() -> list[str]:
    names = (sweep.RUN_MARK, sweep.NODE_MARK)
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]
