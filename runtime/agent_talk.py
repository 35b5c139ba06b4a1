"""What an agent says and hears: the messages of docs/design.md, terms, beats and the lease.

Obedience: a `hello` with a term at least as high as any seen makes its link the obeyed one; a message
of a lower term is answered by `refused` and changes nothing. A `hello` with term 0 only asks.

A controller may be new, or have lost the connection in the middle of anything. So after each welcome
whatever it may have missed is said again (exits, commits, failed restores), and a command that was
carried out already is answered again: by attempt, everything here is idempotent.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perdure.runtime import agent_job, rank_env, ranks
from perdure.runtime.agent_job import Job
from perdure.runtime.agent_peers import Witnesses
from perdure.runtime.core import codec
from perdure.runtime.core.codec import attempt_from_text
from perdure.runtime.core.events import Attempt
from perdure.runtime.errors import UsageError
from perdure.runtime.lease import Lease, majority
from perdure.runtime.logs import Console
from perdure.runtime.ranks import Gang
from perdure.runtime.rendezvous import Rendezvous
from perdure.runtime.spec import Timers
from perdure.runtime.uploader_link import UploaderLink
from perdure.runtime.wire import Link, Listener
from perdure.runtime.zygote_link import ZygoteLink

_KEPT_MAX = 200  # things said while nobody listened; older ones are dropped
SHUTDOWN_S = 30.0  # for staged saves when a controller says that the job is over


class Talk:
    """State that messages read and change. `Agent` adds processes and the loop."""

    zygote: ZygoteLink | None = None
    uploader: UploaderLink
    console: Console | None
    stdin: int
    nothing: int
    watch: Callable[..., None]
    unwatch: Callable[[int], None]
    begin_end: Callable[[float], None]
    leave: Callable[..., None]
    use_zygote: Callable[[ZygoteLink | None], None]
    start_uploader: Callable[[], None]

    def __init__(self, config: dict[str, Any]) -> None:
        self.run_id, self.node = config["run"], config["node"]
        self.host, self.slots = config["host"], config["slots"]
        self.state_dir = config["state_dir"]
        self._token = config["token"]
        self.owned: bool = config["owned"]
        self.job: Job | None = None
        self.gang: Gang | None = None
        self.last: Gang | None = None  # the gang that is gone: its reports may be asked for again
        self.pending_launch: dict[str, Any] | None = None
        self.term = 0
        self._obeyed: Link | None = None
        self._links: set[Link] = set()
        self._stops: list[str] = []  # attempts whose `stopped` is owed
        self._unsaid: deque[dict[str, Any]] = deque(maxlen=_KEPT_MAX)
        self._news: deque[dict[str, Any]] = deque(maxlen=_KEPT_MAX)  # of the uploader: repeated
        self._seq = 0
        self._sent_s: dict[int, float] = {}
        self._welcomed_s: float | None = None
        self._born_s = time.monotonic()
        self._witnesses = Witnesses()
        self._set_timers(Timers())
        self.next_beat_s = self._born_s
        self.rendezvous = Rendezvous(self.host)
        self._listener = Listener(self._token, host=self.host)
        self.port = self._listener.port
        self.watch(self._listener, self._accept)

    def _set_timers(self, timers: Timers) -> None:
        held = self.lease.answered_s if hasattr(self, "lease") else None
        self.lease = Lease(
            timers.beat_s, timers.fence_s, timers.orphan_grace_s, self.owned, answered_s=held
        )

    # -- links

    def _accept(self) -> None:
        link = self._listener.accept()
        if link is not None:
            self._watch_link(link)

    def _watch_link(self, link: Link) -> None:
        if link.broken is None:
            self._links.add(link)
            fd = link.fileno()
            self.watch(link, lambda: self._readable(link, fd), write=link.wants_write)

    def _readable(self, link: Link, fd: int) -> None:
        link.flush()
        for message in link.receive():
            if self._witnesses.owns(link):
                self._witness(link, message)
            else:
                self._hear(link, message)
        self._settle(link, fd)

    def _settle(self, link: Link, fd: int) -> None:
        """Watch for what the link now waits for; forget it if it ended."""
        self.unwatch(fd)
        if link.broken is None:
            self.watch(link, lambda: self._readable(link, fd), write=link.wants_write)
            return
        self._links.discard(link)
        if link is self._obeyed:
            self._obeyed = None

    def _send(self, link: Link, message: dict[str, Any]) -> None:
        if link.broken is None:
            fd = link.fileno()
            link.send(message)
            self._settle(link, fd)

    def tell(self, **message: Any) -> None:
        """Say it to the controller, or keep it until there is one."""
        if self._obeyed is not None:
            self._send(self._obeyed, message)
        elif message["kind"] != "beat":
            self._unsaid.append(message)

    def note(self, text: str) -> None:
        self.tell(kind="note", text=f"{self.node}: {text}")

    def close_links(self) -> None:
        for link in list(self._links):
            link.flush()
            link.close()
        self._listener.close()
        self.rendezvous.close()

    # -- messages

    def _hear(self, link: Link, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "hello":
            self._hello(link, message)
            return
        if message.get("term", -1) < self.term or link is not self._obeyed:
            self._send(link, {"kind": "refused", "term": self.term})
            return
        if self._welcomed_s is not None:  # it has heard our welcome: that beat was answered
            self._answered(self._welcomed_s)
            self._welcomed_s = None
        handler = {
            "job": self._job,
            "launch": self._launch,
            "stop": self._stop,
            "save": self._save,
            "ack": self._ack,
            "shutdown": self._shutdown,
        }.get(kind)
        if handler is None:
            self.note(f"a message of kind {kind!r} is not known here")
        else:
            handler(message)

    def _hello(self, link: Link, message: dict[str, Any]) -> None:
        if message.get("run") != self.run_id:
            link.close()
            return
        term = message["term"]
        if term and term < self.term:
            self._send(link, {"kind": "refused", "term": self.term})
            return
        if term:
            old, self._obeyed, self.term = self._obeyed, link, term
            if old is not None and old is not link:
                fd = old.fileno()
                old.close()
                self._settle(old, fd)
            self._welcomed_s = time.monotonic()
        self._send(link, self._welcome())
        if term:
            self._repeat()

    def _welcome(self) -> dict[str, Any]:
        gang, job = self.gang or self.last, self.job
        return {
            "kind": "welcome",
            "node": self.node,
            "term": self.term,
            "attempt": str(gang.attempt) if gang else None,
            "members": gang.launch["members"] if gang else [],
            "restore": gang.launch["restore"] if gang else None,
            "running": self.gang is not None and self.gang.running,
            "step": self.gang.step if self.gang else 0,
            "slots": self.slots,
            "rendezvous_port": self.rendezvous.port,
            "spec_sha": job.sha if job else None,
            "secrets": job.secrets if job else {},
            "store_env": job.store_env if job else {},
        }

    def _repeat(self) -> None:
        """Say again what a new controller, or a broken connection, may have missed."""
        gang = self.gang or self.last
        for message in self._news:
            self.tell(**message)
        if gang is not None:
            for rank in gang.ranks:
                if rank.report is not None:
                    report = codec.encode(rank.report)
                    self.tell(kind="exited", attempt=str(gang.attempt), report=report)
        unsaid = [message for message in self._unsaid if message["kind"] in ("note", "failed")]
        self._unsaid.clear()
        for message in unsaid:
            self.tell(**message)
        self.next_beat_s = time.monotonic()

    def _job(self, message: dict[str, Any]) -> None:
        try:
            job = agent_job.make(message, self.state_dir)
        except (UsageError, KeyError, TypeError) as error:
            self.tell(kind="failed", why=f"the spec cannot be used here: {error}")
            return
        if self.job is not None and self.job.sha == job.sha:
            self.job.secrets, self.job.store_env = job.secrets, job.store_env
            if self.job.ready:
                self.tell(kind="ready", why="")
            return
        self.job = job
        self._set_timers(job.spec.timers)
        if job.code and not os.path.isdir(job.cwd):
            job.begin_fetch()
        else:
            self.code_fetched(None)

    def code_fetched(self, problem: str | None) -> None:
        job = self.job
        assert job is not None
        if problem is not None:
            self.job = None
            self.tell(kind="failed", why=problem)
            return
        self._choose_zygote(job)
        job.ready = True
        self.tell(kind="ready", why=job.cold or "")

    def _choose_zygote(self, job: Job) -> None:
        old = self.zygote
        fd = old.fileno() if old is not None else -1
        zygote = job.choose_start(old)
        if zygote is not old and old is not None:
            self.unwatch_closed(fd)
        self.use_zygote(zygote)

    def unwatch_closed(self, fd: int) -> None:
        self.unwatch(fd)
        self.zygote = None

    def _launch(self, message: dict[str, Any]) -> None:
        attempt = attempt_from_text(message["attempt"])
        held = self.gang or self.last
        if held is not None and attempt <= held.attempt:
            if held is self.gang and attempt == held.attempt and held.started:
                self._tell_started(held)
            return
        if not self.lease.holds(time.monotonic()):
            self._launch_failed(attempt, "its lease had run out when the launch was read")
            return
        if self.job is None or not self.job.ready:
            self._launch_failed(attempt, "it has no job, or is not ready yet")
            return
        if self.gang is not None:  # of an older attempt: it ends first
            self.pending_launch = message
            self.begin_end(0.0)
            return
        self._begin_gang(message, self.job)

    def _launch_failed(self, attempt: Attempt, why: str) -> None:
        self.tell(kind="failed", attempt=str(attempt), why=f"{self.node}: {why}")

    def _begin_gang(self, message: dict[str, Any], job: Job) -> None:
        log_dir = job.raw["log_dir"] or os.path.join(self.state_dir, "logs")
        try:
            gang = ranks.make(message, job.raw, self.node, os.path.join(job.cwd, log_dir))
        except OSError as error:
            self._launch_failed(
                attempt_from_text(message["attempt"]), f"log folders or pages: {error}"
            )
            return
        self.gang, self.last = gang, None
        self._news.clear()
        self._unsaid.clear()
        gang.set_fence(self.lease.deadline_s())
        self.watch(gang.wake_fd, self._first_step)
        members = {member[0]: member for member in message["members"]}
        _node, group_rank, _first, nproc = members[self.node]
        warm = self.zygote is not None and job.cold is None
        hosts = group_rank == 0 and message["master_port"] == self.rendezvous.port
        env = rank_env.common(
            os.environ,
            job.raw,
            job.secrets,
            message,
            nproc=nproc,
            group_rank=group_rank,
            uploader=self.uploader.path,
            agent_store=warm,
        )
        request = gang.request(job.raw, env, job.cwd)
        store = self.rendezvous.take() if hosts else None
        stored = store.fileno() if warm and store is not None else None
        if message["restore"]:
            self.start_uploader()
        asked = warm and self.zygote is not None
        if not (asked and gang.start_warm(self.zygote, request, self.stdin, stored)):  # type: ignore[arg-type]
            if store is not None:
                store.close()  # rank 0 binds it itself
                store = None
            self._start_cold(
                gang, request, job.cold or "the process that ranks are forked from died"
            )
        if store is not None:
            store.close()
        if self.console is not None:
            for rank in gang.ranks:
                raw = job.raw
                self.console.follow(rank.folder, rank.local_rank, raw["redirects"], raw["tee"])

    def _start_cold(self, gang: Gang, request: dict[str, Any], why: str) -> None:
        request["env"]["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        self.cold_request = None
        try:
            gang.start_cold(request, self.stdin, why)
        except OSError as error:
            self._launch_failed(gang.attempt, f"ranks could not be started: {error}")
            self.begin_end(0.0)
            return
        self._tell_started(gang)

    def zygote_answered(self, answer: dict[str, Any]) -> None:
        gang = self.gang
        if "warm" in answer:
            if not answer["warm"]:
                self.note(f"ranks start cold: {answer['why']}")
        elif gang is None or not gang.forking:
            return
        elif "forked" in answer:
            gang.forked(answer["forked"], answer["store"])
            early, gang.early = gang.early, {}
            self._tell_started(gang)
            for pid, status in early.items():
                self._child_ended(pid, status)
        elif "cold" in answer:
            assert self.job is not None
            self.job.cold = answer["cold"]
            self._again_cold(gang)
        else:
            gang.forking = False
            self._launch_failed(gang.attempt, answer["failed"])
            self.begin_end(0.0)

    _child_ended: Callable[[int, int], None]

    def _again_cold(self, gang: Gang) -> None:
        """The zygote says that this script wants a fresh process. The rendezvous port is given up:
        ranks of other nodes were told the same one, and rank 0 binds it itself."""
        assert self.job is not None
        gang.forking = False
        members = {member[0]: member for member in gang.launch["members"]}
        _node, group_rank, _first, nproc = members[self.node]
        env = rank_env.common(
            os.environ,
            self.job.raw,
            self.job.secrets,
            gang.launch,
            nproc=nproc,
            group_rank=group_rank,
            uploader=self.uploader.path,
            agent_store=False,
        )
        self._start_cold(gang, gang.request(self.job.raw, env, self.job.cwd), self.job.cold or "")

    def zygote_gone(self) -> None:
        if self.gang is not None and self.gang.forking:
            self.gang.forking = False
            self._launch_failed(self.gang.attempt, "the process that ranks are forked from died")
            self.begin_end(0.0)
        if self.job is not None and self.job.cold is None:
            self._choose_zygote(self.job)

    def _tell_started(self, gang: Gang) -> None:
        self.tell(
            kind="started",
            attempt=str(gang.attempt),
            pids={str(rank.rank): rank.pid for rank in gang.ranks},
            cold=gang.cold,
            logs={str(rank.rank): str(Path(rank.folder)) for rank in gang.ranks},
        )

    def _stop(self, message: dict[str, Any]) -> None:
        attempt = attempt_from_text(message["attempt"])
        pending = self.pending_launch
        if pending is not None and attempt >= attempt_from_text(pending["attempt"]):
            self.pending_launch = None
        if self.gang is None or self.gang.attempt > attempt:
            self._tell_stopped(message["attempt"])
            return
        self._stops.append(message["attempt"])
        self.begin_end(float(message.get("grace_s", 0.0)))

    def _tell_stopped(self, attempt: str) -> None:
        port = self.rendezvous.port
        self.tell(kind="stopped", attempt=attempt, rendezvous_port=port)

    def gang_gone(self) -> None:
        """Nothing of the last gang is left."""
        owed, self._stops = self._stops, []
        for attempt in dict.fromkeys(owed):
            self._tell_stopped(attempt)
        launch, self.pending_launch = self.pending_launch, None
        if launch is not None:
            self._launch(launch)

    def _save(self, message: dict[str, Any]) -> None:
        gang = self.gang
        late = True
        if gang is not None and str(gang.attempt) == message["attempt"]:
            late = gang.save_at(message["step"])
        self.tell(kind="save_set", attempt=message["attempt"], step=message["step"], too_late=late)

    def _shutdown(self, message: dict[str, Any]) -> None:
        self.leave(time.monotonic(), grace_s=0.0, within_s=SHUTDOWN_S)

    def uploader_said(self, message: dict[str, Any]) -> None:
        if message["kind"] in ("committed", "restore_failed"):
            self._news.append(message)
            if self._obeyed is not None:
                self.tell(**message)
        elif message["kind"] == "note":
            self.note(message["text"])

    # -- beats and the lease

    def _first_step(self) -> None:
        if self.gang is not None:
            os.eventfd_read(self.gang.wake_fd)
            self.next_beat_s = 0.0

    def beat_if_due(self, now_s: float) -> None:
        if now_s >= self.next_beat_s:
            self.next_beat_s = now_s + self.lease.beat_s * random.uniform(0.9, 1.0)
            self.beat_now()

    def beat_now(self) -> None:
        if self._obeyed is None:
            return
        now_s = time.monotonic()
        self._seq += 1
        self._sent_s[self._seq] = now_s
        self._sent_s.pop(self._seq - _KEPT_MAX, None)
        gang = self.gang
        self.tell(
            kind="beat",
            seq=self._seq,
            attempt=str(gang.attempt) if gang else None,
            rendezvous_port=self.rendezvous.port,
            ranks=gang.views() if gang and gang.started else {},
        )

    def _ack(self, message: dict[str, Any]) -> None:
        sent_s = self._sent_s.pop(message["seq"], None)
        if sent_s is not None:
            self._answered(sent_s)

    def _answered(self, sent_s: float) -> None:
        self.lease.answered(sent_s)
        self._renew_fence()

    def _renew_fence(self) -> None:
        if self.gang is not None and not self.gang.fenced:
            self.gang.set_fence(self.lease.deadline_s())

    def lease_check_s(self) -> float:
        """When the lease next needs a look."""
        now_s = time.monotonic()
        if self.owned:
            return now_s + 60.0
        deadline = self.lease.deadline_s()
        if self.gang is None or deadline is None:
            return now_s + self.lease.beat_s
        return min(deadline, now_s + self.lease.beat_s)

    def check_lease(self, now_s: float) -> None:
        gang = self.gang
        if gang is not None and not gang.fenced and not self.lease.holds(now_s):
            gang.fenced = True  # for good: its page's fence has passed and never moves again
            if not gang.ending:
                self.note(
                    f"no word of the controller for {self.lease.fence_s:.0f} s: the ranks of attempt "
                    f"{gang.attempt} are ended, as their places may be given to others"
                )
            self.begin_end(0.0)
        elif (
            gang is not None
            and gang.started
            and self.lease.wants_witnesses(now_s)
            and now_s - self._witnesses.begun_s > self.lease.beat_s
        ):
            self._ask_witnesses(now_s)
        if self.lease.abandoned(now_s, self._born_s):
            self.note("no controller for too long: this agent leaves")
            self.leave(now_s, grace_s=0.0, within_s=SHUTDOWN_S)

    def _ask_witnesses(self, now_s: float) -> None:
        assert self.gang is not None
        peers = [
            (node, host, port)
            for node, host, port in self.gang.launch.get("peers", [])
            if node != self.node
        ]
        links = self._witnesses.begin(peers, self.run_id, self._token, now_s)
        for link in links:
            fd = link.fileno()
            self.unwatch(fd)
            self.watch(link, lambda link=link, fd=fd: self._readable(link, fd), write=True)

    def _witness(self, link: Link, message: dict[str, Any]) -> None:
        gang = self.gang
        if gang is None:
            return
        self._witnesses.heard(link, message, str(gang.attempt))
        if majority(self._witnesses.alive + 1, len(gang.launch["members"])):
            self.lease.witnessed(self._witnesses.begun_s)
            self._renew_fence()
