"""One agent per node: it starts ranks, says how they are, and ends them. It decides nothing.

A single thread around one selector. It listens, controllers connect; the one with the highest term is
obeyed. This file owns processes and time; `agent_talk.py` answers messages, `agent_launch.py` carries
out launches, `agent_pulse.py` beats and holds the lease. Every child of the node
is created from this thread, so that parent-death signals, which follow the thread, hold.

Ends. A launch, a stop and the end of the lease all go through `_begin_end`: SIGTERM and a grace period
if there is one, then SIGKILL to the ranks and to whatever descends from them, until nothing is left;
only then `stopped` is said and the next launch begins. Orphans come up to this process, a subreaper,
so "nothing is left" is a fact about our own children and not a hope about process groups.

It must never block: not on a rank, a peer, the store or a terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import signal
import time
from collections.abc import Callable
from typing import Any

from perdure.runtime import exits, proc, sweep
from perdure.runtime.agent_job import Job
from perdure.runtime.agent_launch import Launcher
from perdure.runtime.agent_links import Links
from perdure.runtime.agent_pulse import Pulse
from perdure.runtime.agent_talk import Talk
from perdure.runtime.core import codec
from perdure.runtime.logs import Console
from perdure.runtime.ranks import Gang
from perdure.runtime.rendezvous import Rendezvous
from perdure.runtime.uploader_link import UploaderLink
from perdure.runtime.zygote_link import ZygoteLink

LEAVE_GRACE_S = 1.5  # SIGTERM to SIGKILL for ranks when the owner is gone
LEAVE_S = 3.0  # ... and this long for staged saves, in all: the warden waits 4
SHUTDOWN_S = 30.0  # for staged saves when a controller says that the job is over
FORK_S = 15.0  # a zygote that has not answered by then, of a gang that is to end, is given up
_SWEEP_POLL_S = 0.003  # while something of a gang is dying


class Agent:
    """The node's processes and clocks."""

    def __init__(self, config: dict[str, Any], zygote: ZygoteLink | None) -> None:
        self.run_id: str = config["run"]
        self.node: str = config["node"]
        self.slots: int = config["slots"]
        self.state_dir: str = config["state_dir"]
        self.mark = os.environ[sweep.AGENT_MARK]
        self.job: Job | None = None
        self.gang: Gang | None = None
        self.last: Gang | None = None  # the gang that is gone: its reports may be asked for again
        self.pending_launch: dict[str, Any] | None = None  # waits for an older gang's end
        self.end_at_s: float | None = None  # SIGKILL time of the gang that is being ended
        self.leave_by_s: float | None = None  # set once this agent is to leave
        self._leaving_told = False
        self._console_more = False
        self._signals: list[int] = []
        self._oom = exits.OomCounter()
        self._selector = selectors.DefaultSelector()
        self._catch_signals()
        self.stdin = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.console: Console | None = None
        if config["console"]:
            self.stdin, stdout, stderr = config["console"]
            self.console = Console(stdout, stderr)
            self.watch(self.console, self._copy_console)
        self.uploader = UploaderLink(self.mark)
        self.watch(self.uploader.listener, self._rank_wants_uploader)
        self.rendezvous = Rendezvous(config["host"])
        self.pulse = Pulse(self, token=config["token"], owned=config["owned"])
        self.launcher = Launcher(self)
        self.talk = Talk(self)
        self.links = Links(
            self, host=config["host"], token=config["token"], node=self.node, hear=self.talk.hear
        )
        self.zygote: ZygoteLink | None = None
        self._use_zygote(zygote)

    def _catch_signals(self) -> None:
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda number, _: self._signals.append(number))
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(
                number, signal.SIG_IGN
            )  # a terminal's signals are the launcher's business
        self.watch(wake_read, lambda: os.read(wake_read, 4096))

    # -- the loop

    def watch(self, thing: Any, handler: Callable[[], object], *, write: bool = False) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        self._selector.register(thing, events, handler)

    def unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def run(self) -> int:
        """Until this agent has left. Returns the exit code."""
        while True:
            now_s = time.monotonic()
            self._signals_seen()
            self._reap()
            self.pulse.check_lease(now_s)
            self._advance_end(now_s)
            self.pulse.beat_if_due(now_s)
            if self._left(now_s):
                return 0
            ready = self._selector.select(self._sleep_s())
            # Before any message: had we been frozen in that wait, what came meanwhile revives nobody.
            self.pulse.check_lease(time.monotonic())
            for key, _events in ready:
                if key.fd in self._selector.get_map():  # an earlier handler may have closed it
                    key.data()

    def _sleep_s(self) -> float:
        now_s = time.monotonic()
        due = [self.pulse.due_s()]
        if self.gang is not None and self.gang.ending:
            dying = self.end_at_s is None or now_s >= self.end_at_s or not self.gang.living
            poll_s = 0.1 if self.gang.forking else _SWEEP_POLL_S
            due.append(now_s + poll_s if dying else self.end_at_s or now_s)
        if self.leave_by_s is not None:
            due.append(now_s + 0.01)
        if self._console_more:
            due.append(now_s)
        return max(0.0, min(due) - now_s)

    def _signals_seen(self) -> None:
        if self._signals:
            self._signals.clear()
            self.leave(grace_s=LEAVE_GRACE_S, within_s=LEAVE_S)

    # -- children

    def known_children(self) -> frozenset[int]:
        pids = [
            self.zygote.pid if self.zygote else None,
            self.uploader.pid,
            self.job.fetching if self.job else None,
        ]
        return frozenset(pid for pid in pids if pid is not None)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.child_ended(pid, status)

    def child_ended(self, pid: int, status: int) -> None:
        gang = self.gang
        if gang is not None and gang.of_pid(pid) is not None:
            self._rank_ended(gang, pid, status)
        elif gang is not None and gang.forking:
            gang.early[pid] = status
        elif gang is not None and pid == gang.store_pid:
            gang.store_pid = None
            if not gang.ending:
                self.links.note(f"the rendezvous store of attempt {gang.attempt} died")
        elif self.zygote is not None and pid == self.zygote.pid:
            self._hear_zygote()
        elif pid == self.uploader.pid:
            self.uploader.ended()
            self.unwatch(self.uploader.listener.fileno())
            self.watch(self.uploader.listener, self._rank_wants_uploader)
            if status and self.leave_by_s is None:
                self.links.note(
                    f"the uploader died (wait status {status}); it is started again on demand"
                )
        elif self.job is not None and pid == self.job.fetching:
            self.talk.code_fetched(self.job.fetched(status))

    def _rank_ended(self, gang: Gang, pid: int, status: int) -> None:
        rank = gang.of_pid(pid)
        assert rank is not None
        report = gang.ended(rank, status, oom=status == signal.SIGKILL and self._oom.rose())
        self.pulse.beat()  # how far it came: the last beat may be a second old
        self.links.tell(kind="exited", attempt=str(gang.attempt), report=codec.encode(report))
        if status != 0 and not gang.ending:
            # What it leaves behind holds its devices, ports and pipes: ended now, not at the stop.
            orphans = set(sweep.children(os.getpid())) - self.known_children()
            sweep.kill(orphan for orphan in orphans if sweep.session_of(orphan) == pid)

    # -- ending a gang

    def adopt(self, gang: Gang) -> None:
        """A gang is about to start: its pages get the fence, its first step wakes us."""
        self.gang, self.last = gang, None
        self.pulse.renew_fence()
        self.watch(gang.wake_fd, self.pulse.first_step)

    def begin_end(self, grace_s: float) -> None:
        """End the gang there is: now, or within `grace_s` of being asked. Shortens, never prolongs."""
        if self.gang is None:
            return
        kill_at_s = time.monotonic() + grace_s
        first = not self.gang.ending
        if first and grace_s > 0:
            self.gang.ask_to_stop()
        self.gang.ending = True
        self.end_at_s = kill_at_s if first else min(kill_at_s, self.end_at_s or kill_at_s)
        self._advance_end(time.monotonic())

    def _advance_end(self, now_s: float) -> None:
        gang = self.gang
        if gang is None or not gang.ending:
            return
        if gang.forking:  # its pids are not known yet: the answer ends this, or the zygote's end
            if self.zygote is not None and now_s > (self.end_at_s or now_s) + FORK_S:
                sweep.kill([self.zygote.pid])
            return
        if gang.living and self.end_at_s is not None and now_s < self.end_at_s:
            return
        me = os.getpid()
        kept = self.known_children()
        ranks = [rank.pid for rank in gang.living if rank.pid is not None]
        victims = {*ranks, *sweep.descendants(me, without=kept)}
        sweep.kill(victims)
        self._reap()
        if gang.living or set(sweep.children(me)) - kept:
            return
        self._gang_gone(gang)

    def _gang_gone(self, gang: Gang) -> None:
        if self.console is not None:
            self.console.finish()
        self.unwatch(gang.wake_fd)
        gang.release()
        self.gang, self.last, self.end_at_s = None, gang, None
        self.talk.gang_gone()

    # -- leaving

    def leave(self, *, grace_s: float, within_s: float = SHUTDOWN_S) -> None:
        """End everything and return from `run`: ranks first, then staged saves, bounded."""
        by_s = time.monotonic() + within_s
        self.leave_by_s = by_s if self.leave_by_s is None else min(by_s, self.leave_by_s)
        self.pending_launch = None
        self.begin_end(grace_s)

    def _left(self, now_s: float) -> bool:
        if self.leave_by_s is None or (self.gang is not None and now_s < self.leave_by_s):
            return False
        if self.uploader.pid is not None and now_s < self.leave_by_s:
            if not self._leaving_told:
                self._leaving_told = True
                sweep.kill([self.uploader.pid], signal.SIGTERM)
            return False
        left = sweep.kill_descendants(os.getpid(), marked=self.mark)
        if left:
            os.write(2, f"perdure: processes {left} do not die\n".encode())
        self.uploader.close()
        self.links.close()
        return True

    # -- descriptors that speak

    def _copy_console(self) -> None:
        assert self.console is not None
        self._console_more = self.console.copy()

    def _hear_zygote(self) -> None:
        if self.zygote is None:
            return
        for answer in self.zygote.answers():
            if answer.get("gone"):
                self._use_zygote(None)
                self.launcher.zygote_gone()
            else:
                self.launcher.zygote_answered(answer)

    def choose_zygote(self, job: Job) -> None:
        """Have the zygote that this job's ranks need, which may be another, or none."""
        self._use_zygote(job.choose_start(self.zygote))

    def _use_zygote(self, zygote: ZygoteLink | None) -> None:
        if zygote is self.zygote:
            return
        if self.zygote is not None:
            self.unwatch(self.zygote.fileno())
            self.zygote.close()
        self.zygote = zygote
        if zygote is not None:
            self.watch(zygote, self._hear_zygote)

    def _rank_wants_uploader(self) -> None:
        if self.job is None or time.monotonic() < self.uploader.may_start_s():
            return
        self.start_uploader()

    def start_uploader(self) -> None:
        if self.uploader.pid is not None or self.job is None:
            return
        self.unwatch(self.uploader.listener.fileno())
        job = self.job
        config = {
            "store": job.raw["store"],
            "storage_options": None,
            "run": job.raw["run"],
            "local_world_size": job.raw["nproc_per_node"],
        }
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.uploader.start(config, {**env, **job.rank_variables(), **job.store_env})
        assert self.uploader.control is not None
        self.watch(self.uploader.control, self._hear_uploader)

    def _hear_uploader(self) -> None:
        control = self.uploader.control
        assert control is not None
        messages = self.uploader.heard()
        if messages is None:
            self.unwatch(control)
            self.uploader.silent()
            return
        for message in messages:
            self.talk.uploader_said(message)


def main(zygote: ZygoteLink | None) -> int:
    """Read the configuration from stdin, listen, say where on stdout, and serve until the end."""
    proc.set_name("perdure-agent")
    with open(0, "rb", closefd=False) as stdin:
        config = json.loads(stdin.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.umask(os.umask(0o77) | 0o22)
    random.seed()
    slow = proc.back_to_normal_priority()
    agent = Agent(config, zygote)
    proc.set_command_line(["perdure-agent", config["run"], config["node"]])
    os.write(1, json.dumps({"port": agent.links.port, "pid": os.getpid()}).encode() + b"\n")
    os.dup2(2, 1)  # whoever started us reads one line and closes; a later print must not fail
    if slow:
        agent.links.note(slow)
    killed = sweep.kill_marked(
        spare_agent=agent.mark,
        **{sweep.RUN_MARK: config["run"], sweep.NODE_MARK: config["node"]},
    )
    if killed:
        agent.links.note(
            f"{killed} processes of an earlier agent of this node were still there: killed"
        )
    return agent.run()
