"""The driver's side of all agents: one link each, kept up, and what they say turned into events.

An agent is told apart by node and port: a new port is a new agent, and the old one is lost. A link
that breaks is dialled again at once. If nobody listens there any more the agent is gone and that is
said at once; if nothing answers, the node is merely silent, and for how long is all that is said: when
silence becomes loss is the core's decision, by its timers. Commands that were not answered are sent
again after a reconnect: performing one twice is performing it once.

The lease: a beat is acknowledged only while the core still counts on that node. A node given up for
its silence, or excluded, gets no word from us until it is offered anew, so its own fence falls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from perdure.runtime.cluster import AgentEndpoint, ClusterView
from perdure.runtime.core import codec
from perdure.runtime.core.events import AgentAnswer, Attempt, Event, NodeLost, NodeOffer
from perdure.runtime.watch import Watch
from perdure.runtime.wire import Link, Message

REDIAL_S = (0.0, 0.1, 0.3, 1.0)


@dataclass(slots=True)
class Agent:
    endpoint: AgentEndpoint
    heard_s: float
    link: Link | None = None
    redial_at_s: float | None = None
    failed_dials: int = 0
    welcome: Message | None = None
    ready: bool = False
    unfit: str = ""  # why it cannot take the job, in its own words
    rendezvous_port: int = 0
    unanswered: list[Message] = field(default_factory=list)  # launch and stop


class Fleet:
    """`on_message(agent, message)` gets what is not about the link itself; `emit` gets events."""

    def __init__(
        self,
        *,
        run: str,
        term: int,
        watch: Watch,
        stamp_s: Callable[[], float],
        emit: Callable[[Event], None],
        say: Callable[[str, str], None],
        on_message: Callable[[Agent, Message], None],
        job: Callable[[Message], Message | None],
    ) -> None:
        self._run, self._term, self._watch = run, term, watch
        self._stamp_s, self._emit, self._say = stamp_s, emit, say
        self._on_message, self._job = on_message, job
        self.agents: dict[str, Agent] = {}
        self.barred: frozenset[str] = frozenset()
        self.gone: set[tuple[str, int]] = set()  # (node, port) that no view brings back
        self.superseded_by: int | None = None
        self.parting = False
        self._parting: list[Link] = []

    def meet(self, view: ClusterView, now_s: float) -> None:
        """Follow the cluster: dial who is new, give up who is lost."""
        for node, why in view.lost:
            if node in self.barred:  # dropped long ago; but now it is known to be dead
                self._emit(NodeLost(at_s=self._stamp_s(), node=node, why=why))
            self.lose(node, why)
        for endpoint in view.agents:
            node = endpoint.node
            if node in self.barred or (node, endpoint.port) in self.gone:
                continue
            known = self.agents.get(node)
            if known is not None and known.endpoint.port != endpoint.port:
                self.lose(node, "its agent was replaced by a new one")
                known = None
            if known is None:
                self.agents[node] = Agent(endpoint=endpoint, heard_s=now_s, redial_at_s=now_s)
        self.dial(now_s)

    def bar(self, nodes: Iterable[str]) -> None:
        """Nothing more is said to these nodes until they are no longer named here."""
        self.barred = frozenset(nodes)
        for node in self.barred & self.agents.keys():
            self._drop(node)

    def dial(self, now_s: float) -> None:
        """Dial whoever is due; drop a handshake that hangs."""
        for agent in list(self.agents.values()):
            link = agent.link
            if link is not None and link.broken is None and link.stale(time.monotonic()):
                link.close()
                self._ended(agent, now_s)
            if agent.redial_at_s is not None and agent.redial_at_s <= now_s:
                self._dial(agent, now_s)

    def _dial(self, agent: Agent, now_s: float) -> None:
        agent.redial_at_s = None
        endpoint = agent.endpoint
        link = Link.dialling(endpoint.host, endpoint.port, endpoint.token)
        agent.link = link
        link.send({"kind": "hello", "run": self._run, "term": self._term})
        if link.broken is not None:
            self._ended(agent, now_s)
        else:
            self._watch.add(link, lambda: self._news(agent, link))

    def _news(self, agent: Agent, link: Link) -> None:
        link.flush()
        messages = link.receive()
        if agent.link is not link:
            return
        if messages:
            agent.heard_s = self._stamp_s()
        for message in messages:
            self._heard(agent, message)
        if link.broken is not None and agent.link is link:
            self._ended(agent, self._stamp_s())

    def _heard(self, agent: Agent, message: Message) -> None:
        kind = message["kind"]
        if port := message.get("rendezvous_port"):
            agent.rendezvous_port = port
        if kind == "welcome":
            agent.welcome = message
            agent.failed_dials = 0
            self.offer_job(agent)
        elif kind == "ready":
            agent.ready, agent.unfit = True, ""
            for command in agent.unanswered:
                self._to(agent, command)
        elif kind == "failed" and message.get("attempt"):
            agent.unanswered = [m for m in agent.unanswered if m["kind"] != "launch"]
            self._on_message(agent, message)
        elif kind == "failed":
            agent.ready, agent.unfit = False, str(message.get("why", "no reason given"))
            self._say(agent.endpoint.node, f"cannot take the job: {agent.unfit}")
        elif kind == "refused":
            self.superseded_by = max(self.superseded_by or 0, int(message.get("term") or 0))
        else:
            if kind == "beat" and agent.ready:
                self._to(agent, {"kind": "ack", "seq": message.get("seq")})
            elif kind in ("started", "stopped"):
                self._answered(agent, kind, message)
            self._on_message(agent, message)

    def offer_job(self, agent: Agent) -> None:
        """Give the job to an agent that has said welcome; not before its secrets are known."""
        if agent.welcome is not None and (job := self._job(agent.welcome)) is not None:
            self._to(agent, job)

    def command(self, node: str, message: Message) -> bool:
        """Send a launch or a stop, now or when the node is back. False: there is no such agent."""
        agent = self.agents.get(node)
        if agent is None:
            return False
        agent.unanswered = [m for m in agent.unanswered if m["kind"] != message["kind"]]
        agent.unanswered.append(message)
        if agent.ready:
            self._to(agent, message)
        return True

    def tell(self, nodes: Iterable[str], message: Message) -> None:
        for node in nodes:
            if (agent := self.agents.get(node)) is not None and agent.ready:
                self._to(agent, message)

    def _to(self, agent: Agent, message: Message) -> None:
        if agent.link is not None:
            agent.link.send({**message, "term": self._term})

    def _answered(self, agent: Agent, kind: str, message: Message) -> None:
        what = "launch" if kind == "started" else "stop"
        try:
            upto = codec.attempt_from_text(message.get("attempt", ""))
        except ValueError:
            return  # `_on_message` says so
        agent.unanswered = [
            m
            for m in agent.unanswered
            if m["kind"] != what or codec.attempt_from_text(m["attempt"]) > upto
        ]

    def _ended(self, agent: Agent, now_s: float) -> None:
        """The link is broken: who refuses is gone, who does not answer is called again."""
        link, agent.link, agent.ready = agent.link, None, False
        assert link is not None
        if self.parting:
            return
        if link.refused:
            self.lose(agent.endpoint.node, "its agent is gone: the port refuses")
            return
        agent.redial_at_s = now_s + REDIAL_S[min(agent.failed_dials, len(REDIAL_S) - 1)]
        agent.failed_dials += 1
        self.dial(now_s)

    def part(self, message: Message) -> None:
        """The last word to every agent; links that break from now on are left alone."""
        for agent in self.agents.values():
            self._to(agent, message)
        self._parting = [a.link for a in self.agents.values() if a.ready and a.link is not None]
        self.parting = True

    def flushed(self) -> bool:
        return not any(link.wants_write for link in self._parting)

    def parted(self) -> bool:
        """Every agent that could hear the last word has closed its link: nothing is left there."""
        return all(link.broken is not None for link in self._parting)

    def close(self) -> None:
        for agent in self.agents.values():
            if agent.link is not None:
                agent.link.close()

    def lose(self, node: str, why: str) -> None:
        if node in self.agents:
            self._drop(node)
            self._emit(NodeLost(at_s=self._stamp_s(), node=node, why=why))

    def _drop(self, node: str) -> None:
        agent = self.agents.pop(node)
        if node not in self.barred:
            self.gone.add((node, agent.endpoint.port))
        if agent.link is not None:
            agent.link.close()

    def give_up(self, node: str, now_s: float) -> None:
        """Silent for too long: no word to it until it has said welcome anew."""
        if (agent := self.agents.get(node)) is not None:
            if agent.link is not None:
                agent.link.close()
            agent.link, agent.ready, agent.welcome = None, False, None
            agent.redial_at_s, agent.failed_dials = now_s + REDIAL_S[-1], len(REDIAL_S)

    def excuse(self, pause_s: float) -> None:
        """The driver itself was not running for `pause_s`: that was nobody's silence."""
        for agent in self.agents.values():
            agent.heard_s += pause_s

    def offers(self) -> tuple[NodeOffer, ...]:
        ready = (a.endpoint for a in self.agents.values() if a.ready)
        return tuple(NodeOffer(e.node, e.slots) for e in sorted(ready, key=lambda e: e.node))

    def late(self, now_s: float, after_s: float) -> tuple[tuple[str, float], ...]:
        silent = ((a.endpoint.node, now_s - a.heard_s) for a in self.agents.values())
        return tuple(sorted((node, s) for node, s in silent if s > after_s))

    def unfit(self) -> list[str]:
        return [f"{a.endpoint.node}: {a.unfit}" for a in self.agents.values() if a.unfit]

    def answers(self) -> dict[str, AgentAnswer]:
        """What each agent said of itself, of those that can be commanded."""
        ready = (a for a in self.agents.values() if a.ready and a.welcome is not None)
        return {a.endpoint.node: answer_of(a) for a in ready}

    def deadline_s(self) -> float | None:
        return min((a.redial_at_s for a in self.agents.values() if a.redial_at_s), default=None)


def answer_of(agent: Agent) -> AgentAnswer:
    """Raises ValueError when the welcome does not fit."""
    welcome: dict[str, Any] = agent.welcome or {}
    attempt = welcome.get("attempt")
    return AgentAnswer(
        node=agent.endpoint.node,
        attempt=_attempt(attempt),
        members=codec.members_from_json(welcome.get("members") or []),
        restore=codec.restore_from_json(welcome.get("restore")),
        running=bool(welcome.get("running")),
        step=int(welcome.get("step") or 0),
    )


def _attempt(text: str | None) -> Attempt | None:
    return None if not text else codec.attempt_from_text(text)
