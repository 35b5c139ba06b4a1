"""Beats out, acknowledgements in, and the lease that hangs on them.

A beat goes out each `beat_s` (jittered, so that a thousand nodes do not speak at once), at the first
step of an attempt, and before each exit. The lease's law is `lease.py`; here it meets the clock: the
deadline is written into every rank's page, so that a rank frozen with its agent leaves by itself.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING, Any

from perdure.runtime.agent_peers import Witnesses
from perdure.runtime.lease import Lease, majority
from perdure.runtime.spec import Timers
from perdure.runtime.wire import Link

if TYPE_CHECKING:
    from perdure.runtime.agent import Agent

_SENT_MAX = 200


class Pulse:
    def __init__(self, agent: Agent, *, token: str, owned: bool) -> None:
        self._agent, self._token = agent, token
        self._born_s = time.monotonic()
        self._owned = owned
        self.lease = self._lease(Timers(), None)
        self.next_beat_s = self._born_s
        self._seq = 0
        self._sent_s: dict[int, float] = {}
        self._welcomed_s: float | None = None
        self._witnesses = Witnesses()

    def _lease(self, timers: Timers, answered_s: float | None) -> Lease:
        return Lease(
            timers.beat_s,
            timers.fence_s,
            timers.orphan_grace_s,
            owned=self._owned,
            answered_s=answered_s,
        )

    def use(self, timers: Timers) -> None:
        self.lease = self._lease(timers, self.lease.answered_s)

    def first_step(self) -> None:
        if self._agent.gang is not None:
            os.eventfd_read(self._agent.gang.wake_fd)
            self.next_beat_s = 0.0

    def beat_if_due(self, now_s: float) -> None:
        if now_s >= self.next_beat_s:
            self.next_beat_s = now_s + self.lease.beat_s * random.uniform(0.9, 1.0)
            self.beat()

    def beat(self) -> None:
        agent = self._agent
        if agent.links.obeyed is None:
            return
        self._seq += 1
        self._sent_s[self._seq] = time.monotonic()
        self._sent_s.pop(self._seq - _SENT_MAX, None)
        gang = agent.gang
        agent.links.tell(
            kind="beat",
            seq=self._seq,
            attempt=str(gang.attempt) if gang else None,
            rendezvous_port=agent.rendezvous.port,
            ranks=gang.views() if gang and gang.started else {},
        )

    def welcomed(self) -> None:
        """A welcome goes out: the next word of that controller answers it like a beat."""
        self._welcomed_s = time.monotonic()

    def controller_spoke(self) -> None:
        if self._welcomed_s is not None:
            self._answered(self._welcomed_s)
            self._welcomed_s = None

    def acknowledged(self, seq: int) -> None:
        sent_s = self._sent_s.pop(seq, None)
        if sent_s is not None:
            self._answered(sent_s)

    def _answered(self, sent_s: float) -> None:
        self.lease.answered(sent_s)
        self.renew_fence()

    def renew_fence(self) -> None:
        gang = self._agent.gang
        if gang is not None and not gang.fenced:
            gang.set_fence(self.lease.deadline_s())

    def due_s(self) -> float:
        """When this part of the agent next needs a turn."""
        deadline = self.lease.deadline_s()
        if self._agent.gang is None or deadline is None:
            return self.next_beat_s
        # A gang that is fenced already is being ended: its deadline has passed and wakes nobody.
        return self.next_beat_s if self._agent.gang.fenced else min(deadline, self.next_beat_s)

    def check_lease(self, now_s: float) -> None:
        """End ranks whose lease ran out; ask witnesses when the controller is late; or leave."""
        agent, lease = self._agent, self.lease
        gang = agent.gang
        if gang is not None and not gang.fenced and not lease.holds(now_s):
            gang.fenced = True  # for good: its pages' fence has passed and never moves again
            if not gang.ending:
                agent.links.note(
                    f"no word of the controller for {lease.fence_s:g} s: the ranks of attempt "
                    f"{gang.attempt} are ended, as their places may be given to others"
                )
            agent.begin_end(0.0)
        elif gang is not None and gang.started and lease.wants_witnesses(now_s):
            self._ask_witnesses(now_s)
        if agent.leave_by_s is None and lease.abandoned(now_s, self._born_s):
            agent.links.note("no controller for too long: this agent leaves")
            agent.leave(grace_s=0.0)

    def _ask_witnesses(self, now_s: float) -> None:
        agent = self._agent
        if now_s - self._witnesses.begun_s < self.lease.beat_s or agent.gang is None:
            return
        agent.links.drop(self._witnesses.asked)
        peers = [peer for peer in agent.gang.launch.get("peers", []) if peer[0] != agent.node]
        for link in self._witnesses.begin(peers, agent.run_id, self._token, now_s):
            agent.links.add(link, self._witness)

    def _witness(self, link: Link, message: dict[str, Any]) -> None:
        gang = self._agent.gang
        if gang is not None:
            self._witnesses.heard(link, message, str(gang.attempt))
            if majority(self._witnesses.alive + 1, len(gang.launch["members"])):
                self.lease.witnessed(self._witnesses.begun_s)
                self.renew_fence()
