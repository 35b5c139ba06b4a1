"""What an agent answers to each message of docs/design.md.

A message of a lower term than the highest seen is answered by `refused` and changes nothing; a `hello`
with term 0 only asks. A controller may be new, or have lost the connection in the middle of anything:
after each welcome whatever it may have missed is said again (exits, commits, failed restores), and a
command that was carried out already is answered again. By attempt, everything here is idempotent.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from perdure.runtime import agent_job
from perdure.runtime.core import codec
from perdure.runtime.core.codec import attempt_from_text
from perdure.runtime.errors import UsageError
from perdure.runtime.wire import Link

if TYPE_CHECKING:
    from perdure.runtime.agent import Agent

_NEWS_MAX = 200


class Talk:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._stops: list[str] = []  # attempts whose `stopped` is owed
        self._news: deque[dict[str, Any]] = deque(
            maxlen=_NEWS_MAX
        )  # the uploader's, of this attempt
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "job": self._job,
            "launch": self._launch,
            "stop": self._stop,
            "save": self._save,
            "ack": lambda message: agent.pulse.acknowledged(message["seq"]),
            "shutdown": lambda _message: agent.leave(grace_s=0.0),
        }

    def hear(self, link: Link, message: dict[str, Any]) -> None:
        agent, kind = self._agent, message["kind"]
        links = agent.links
        if kind == "hello":
            self._hello(link, message)
        elif message.get("term", -1) < links.term or link is not links.obeyed:
            links.send(link, kind="refused", term=links.term)
        elif handler := self._handlers.get(kind):
            agent.pulse.controller_spoke()
            handler(message)
        else:
            links.note(f"a message of kind {kind!r} is not known here")

    def _hello(self, link: Link, message: dict[str, Any]) -> None:
        agent, term = self._agent, message["term"]
        if message.get("run") != agent.run_id:
            agent.links.drop([link])
        elif term == 0:
            agent.links.send(link, **self._welcome())
        elif term < agent.links.term:
            agent.links.send(link, kind="refused", term=agent.links.term)
        else:
            agent.links.obey(link, term)
            agent.pulse.welcomed()
            agent.links.send(link, **self._welcome())
            self._repeat()

    def _welcome(self) -> dict[str, Any]:
        agent = self._agent
        gang, job = agent.gang or agent.last, agent.job
        return {
            "kind": "welcome",
            "node": agent.node,
            "term": agent.links.term,
            "attempt": str(gang.attempt) if gang else None,
            "members": gang.launch["members"] if gang else [],
            "restore": gang.launch["restore"] if gang else None,
            "running": agent.gang is not None and agent.gang.running,
            "step": agent.gang.step if agent.gang else 0,
            "slots": agent.slots,
            "rendezvous_port": agent.rendezvous.port,
            "spec_sha": job.sha if job else None,
            "secrets": job.secrets if job else {},
            "store_env": job.store_env if job else {},
        }

    def _repeat(self) -> None:
        """Say again what a new controller, or a broken connection, may have missed."""
        agent = self._agent
        gang = agent.gang or agent.last
        for message in self._news:
            agent.links.tell(**message)
        for rank in gang.ranks if gang is not None else ():
            if gang is not None and rank.report is not None:
                report = codec.encode(rank.report)
                agent.links.tell(kind="exited", attempt=str(gang.attempt), report=report)
        agent.links.say_unsaid()
        agent.pulse.next_beat_s = time.monotonic()

    def _job(self, message: dict[str, Any]) -> None:
        agent = self._agent
        try:
            job = agent_job.make(message, agent.state_dir)
        except (UsageError, KeyError, TypeError) as error:
            agent.links.tell(kind="failed", why=f"{agent.node}: the spec cannot be used: {error}")
            return
        known = agent.job
        if known is not None and known.sha == job.sha:
            known.secrets, known.store_env = job.secrets, job.store_env
            if known.ready:
                agent.links.tell(kind="ready", why=known.cold or "")
            return
        agent.job = job
        agent.pulse.use(job.spec.timers)
        if job.code and not os.path.isdir(job.cwd):
            job.begin_fetch()
        else:
            self.code_fetched(None)

    def code_fetched(self, problem: str | None) -> None:
        """The code is there, or `problem` says why not."""
        agent, job = self._agent, self._agent.job
        assert job is not None
        if problem is not None:
            agent.job = None
            agent.links.tell(kind="failed", why=f"{agent.node}: {problem}")
            return
        agent.choose_zygote(job)
        job.ready = True
        agent.links.tell(kind="ready", why=job.cold or "")

    def _launch(self, message: dict[str, Any]) -> None:
        agent = self._agent
        self._news.clear()
        agent.launcher.obey(message, lease_holds=agent.pulse.lease.holds(time.monotonic()))

    def _stop(self, message: dict[str, Any]) -> None:
        agent, attempt = self._agent, attempt_from_text(message["attempt"])
        pending = agent.pending_launch
        if pending is not None and attempt >= attempt_from_text(pending["attempt"]):
            agent.pending_launch = None
        if agent.gang is None or agent.gang.attempt > attempt:
            self._tell_stopped(message["attempt"])
        else:
            self._stops.append(message["attempt"])
            agent.begin_end(float(message.get("grace_s", 0.0)))

    def _tell_stopped(self, attempt: str) -> None:
        port = self._agent.rendezvous.port
        self._agent.links.tell(kind="stopped", attempt=attempt, rendezvous_port=port)

    def gang_gone(self) -> None:
        """Nothing of the last gang is left: what waited for that goes on."""
        owed, self._stops = self._stops, []
        for attempt in dict.fromkeys(owed):
            self._tell_stopped(attempt)
        launch, self._agent.pending_launch = self._agent.pending_launch, None
        if launch is not None:
            self._launch(launch)

    def _save(self, message: dict[str, Any]) -> None:
        gang, step = self._agent.gang, message["step"]
        held = gang is not None and str(gang.attempt) == message["attempt"]
        late = gang.save_at(step) if gang is not None and held else True
        self._agent.links.tell(
            kind="save_set", attempt=message["attempt"], step=step, too_late=late
        )

    def uploader_said(self, message: dict[str, Any]) -> None:
        if message["kind"] in ("committed", "restore_failed"):
            self._news.append(message)
            if self._agent.links.obeyed is not None:
                self._agent.links.tell(**message)
        elif message["kind"] == "note":
            self._agent.links.note(message["text"])
