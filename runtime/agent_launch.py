"""Carrying out a launch on this node: warm through the zygote, or cold, and saying how it went.

The rendezvous store of the attempt is served from a socket that this agent has been listening on, if
the node holds rank 0 and the zygote can fork a store; where ranks start cold the port is given up, and
rank 0 binds it itself, as under torchrun with a static rendezvous.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from perdure.runtime import rank_env, ranks
from perdure.runtime.agent_job import Job
from perdure.runtime.core.codec import attempt_from_text
from perdure.runtime.ranks import Gang

if TYPE_CHECKING:
    from perdure.runtime.agent import Agent

_ZYGOTE_DIED = "the process that ranks are forked from died"


class Launcher:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def begin(self, launch: dict[str, Any], job: Job) -> None:
        """Start this node's ranks of a launch; there is no gang here now."""
        agent = self._agent
        log_dir = os.path.join(job.cwd, job.raw["log_dir"] or os.path.join(agent.state_dir, "logs"))
        try:
            gang = ranks.make(launch, job.raw, agent.node, log_dir)
        except OSError as error:
            self.failed(launch["attempt"], f"log folders or pages: {error}")
            return
        agent.adopt(gang)
        if launch["restore"]:
            agent.start_uploader()
        if not (job.cold is None and self._warm(gang, job)):
            self._cold(gang, job, job.cold or _ZYGOTE_DIED)
        if agent.console is not None and agent.gang is gang:
            for rank in gang.ranks:
                raw = job.raw
                agent.console.follow(rank.folder, rank.local_rank, raw["redirects"], raw["tee"])

    def _warm(self, gang: Gang, job: Job) -> bool:
        agent = self._agent
        if agent.zygote is None:
            return False
        store = self._take_port(gang)
        try:
            fd = store.fileno() if store is not None else None
            request = self._request(gang, job, agent_store=True)
            return gang.start_warm(agent.zygote, request, agent.stdin, fd)
        finally:
            if store is not None:
                store.close()  # the zygote has it now, or nobody

    def _cold(self, gang: Gang, job: Job, why: str) -> None:
        store = self._take_port(gang)
        if store is not None:
            store.close()  # for rank 0 to bind
        try:
            gang.start_cold(self._request(gang, job, agent_store=False), self._agent.stdin, why)
        except OSError as error:
            self.failed(str(gang.attempt), f"ranks could not be started: {error}")
            self._agent.begin_end(0.0)
            return
        self.tell_started(gang)

    def _take_port(self, gang: Gang) -> socket.socket | None:
        rendezvous = self._agent.rendezvous
        hosts = gang.member[1] == 0 and gang.launch["master_port"] == rendezvous.port
        return rendezvous.take() if hosts else None

    def _request(self, gang: Gang, job: Job, *, agent_store: bool) -> dict[str, Any]:
        env = rank_env.common(
            os.environ,
            job.raw,
            job.secrets,
            gang.launch,
            nproc=gang.member[3],
            group_rank=gang.member[1],
            uploader=self._agent.uploader.path,
            agent_store=agent_store,
        )
        return gang.request(job.raw, env, job.cwd)

    def failed(self, attempt: str, why: str) -> None:
        links = self._agent.links
        links.tell(kind="failed", attempt=attempt, why=f"{self._agent.node}: {why}")

    def tell_started(self, gang: Gang) -> None:
        self._agent.links.tell(
            kind="started",
            attempt=str(gang.attempt),
            pids={str(rank.rank): rank.pid for rank in gang.ranks},
            cold=gang.cold,
            logs={str(rank.rank): str(rank.folder) for rank in gang.ranks},
        )

    def zygote_answered(self, answer: dict[str, Any]) -> None:
        agent, gang = self._agent, self._agent.gang
        if "warm" in answer:
            if not answer["warm"]:
                agent.links.note(f"ranks start cold: {answer['why']}")
        elif gang is None or not gang.forking or agent.job is None:
            return
        elif "forked" in answer:
            gang.forked(answer["forked"], answer["store"])
            early, gang.early = gang.early, {}
            self.tell_started(gang)
            for pid, status in early.items():
                agent.child_ended(pid, status)
        elif "cold" in answer:
            gang.forking = False
            agent.job.cold = answer["cold"]
            if gang.ending:
                agent.begin_end(0.0)
            else:
                self._cold(gang, agent.job, answer["cold"])
        else:
            self._fork_failed(gang, answer["failed"])

    def _fork_failed(self, gang: Gang, why: str) -> None:
        gang.forking = False
        self.failed(str(gang.attempt), why)
        self._agent.begin_end(0.0)

    def zygote_gone(self) -> None:
        """It died. A launch it was asked for has failed; the next one goes to another zygote."""
        agent = self._agent
        agent.links.note(f"{_ZYGOTE_DIED}; a new one is started")
        if agent.gang is not None and agent.gang.forking:
            self._fork_failed(agent.gang, _ZYGOTE_DIED)
        if agent.job is not None and agent.job.cold is None:
            agent.choose_zygote(agent.job)

    def obey(self, launch: dict[str, Any], *, lease_holds: bool) -> None:
        """A `launch` message: once by attempt, in order, and only under a lease that holds."""
        agent = self._agent
        attempt = attempt_from_text(launch["attempt"])
        held = agent.gang or agent.last
        if held is not None and attempt <= held.attempt:
            if held is agent.gang and attempt == held.attempt and held.started:
                self.tell_started(held)
        elif not lease_holds:
            self.failed(launch["attempt"], "its lease had run out when the launch was read")
        elif agent.job is None or not agent.job.ready:
            self.failed(launch["attempt"], "it has no job, or is not ready yet")
        elif agent.gang is not None:  # of an older attempt: it ends first
            agent.pending_launch = launch
            agent.begin_end(0.0)
        else:
            self.begin(launch, agent.job)
