"""A driver in a world without processes: agents that are sockets, served by the driver's own loop.

No thread and no sleep: the fake agents' sockets lie in the driver's watch, so each turn of its loop
serves both sides of the wire. A test's script is the observer, which sees every turn that has news.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from perdure.checkpoint.store import MemoryStore, Store
from perdure.runtime.cluster import AgentEndpoint, ClusterView
from perdure.runtime.driver import Driver
from perdure.runtime.opening import prepare
from perdure.runtime.spec import JobSpec, Timers
from perdure.runtime.wire import Link, Listener, Message

TOKEN = "token"


class FakeAgent:
    """Answers as an agent does; its ranks exist in its head alone."""

    def __init__(self, node: str, slots: int = 2) -> None:
        self.node, self.slots = node, slots
        self.listener = Listener(TOKEN)
        self.links: list[Link] = []
        self.heard: list[Message] = []
        self.deaf: set[str] = set()  # kinds that it does not answer
        self.term = 0
        self.attempt: str | None = None
        self.launch: Message = {}
        self.running = False
        self.seq = 0
        self.port = 20000
        self.secrets: dict[str, str] = {}

    @property
    def endpoint(self) -> AgentEndpoint:
        port = self.listener.port
        return AgentEndpoint(
            node=self.node, host="127.0.0.1", port=port, slots=self.slots, token=TOKEN
        )

    def attach(self, driver: Driver) -> None:
        def accept() -> None:
            while (link := self.listener.accept()) is not None:
                self.links.append(link)
                driver._watch.add(link, functools.partial(self.news, link))

        driver._watch.add(self.listener, accept)

    def news(self, link: Link) -> None:
        link.flush()
        for message in link.receive():
            self.heard.append(message)
            if message["kind"] in self.deaf:
                continue
            if message["term"] < self.term:
                link.send({"kind": "refused", "term": self.term})
                continue
            self.term = message["term"]
            getattr(self, f"on_{message['kind']}")(link, message)

    def say(self, **message: Any) -> None:
        for link in self.links:
            link.send(message)

    def kinds(self) -> list[str]:
        return [message["kind"] for message in self.heard]

    def on_hello(self, link: Link, message: Message) -> None:
        link.send(
            {
                "kind": "welcome",
                "node": self.node,
                "term": self.term,
                "attempt": self.attempt,
                "members": self.launch.get("members", []),
                "restore": self.launch.get("restore"),
                "running": self.running,
                "step": 0,
                "slots": self.slots,
                "rendezvous_port": self.port,
                "spec_sha": None,
                "secrets": self.secrets,
            }
        )

    def on_job(self, link: Link, message: Message) -> None:
        self.secrets = message["secrets"]
        link.send({"kind": "ready"})

    def on_launch(self, link: Link, message: Message) -> None:
        self.attempt, self.launch, self.running = message["attempt"], message, True
        link.send({"kind": "started", "attempt": self.attempt, "pids": {}, "cold": None})

    def on_stop(self, link: Link, message: Message) -> None:
        self.running = False
        self.port += 1
        attempt = message["attempt"]
        link.send({"kind": "stopped", "attempt": attempt, "rendezvous_port": self.port})

    def on_save(self, link: Link, message: Message) -> None:
        link.send({**message, "kind": "save_set", "too_late": False})

    def on_ack(self, link: Link, message: Message) -> None:
        pass

    def on_shutdown(self, link: Link, message: Message) -> None:
        self.running = False
        link.close()

    def ranks(self) -> list[int]:
        mine = next(m for m in self.launch["members"] if m[0] == self.node)
        return list(range(mine[2], mine[2] + mine[3]))

    def beat(self, step: int, **more: Any) -> None:
        self.seq += 1
        rank = {"step": step, "phase": 2, "age_s": 0.0, "loss": None, "total": None, **more}
        ranks = {str(r): {"uses_due": False, **rank} for r in self.ranks()}
        self.say(kind="beat", seq=self.seq, attempt=self.attempt, ranks=ranks, rendezvous_port=0)

    def exited(self, rank: int, **report: Any) -> None:
        report = {"rank": rank, "node": self.node, "at": 0.0, **report}
        self.say(kind="exited", attempt=self.attempt, report=report)

    def all_exit(self, **report: Any) -> None:
        for rank in self.ranks():
            self.exited(rank, **report)

    def die(self) -> None:
        """Its process is gone: nobody listens there any more."""
        self.listener.close()
        for link in self.links:
            link.close()


class FakeCluster:
    def __init__(self, *agents: FakeAgent) -> None:
        self.agents = {agent.node: agent for agent in agents}
        self.requests: list[tuple[int, frozenset[str]]] = []
        self.closed = 0

    def request(self, count: int, exclude: frozenset[str]) -> None:
        self.requests.append((count, exclude))

    def poll(self) -> ClusterView:
        return ClusterView(agents=tuple(agent.endpoint for agent in self.agents.values()))

    def close(self) -> None:
        self.closed += 1


class World:
    """One job, its store and agents; `run(script)` is a whole controller's life."""

    def __init__(self, nnodes: int = 1, spares: int = 0) -> None:
        self.store: Store = MemoryStore(f"memory://{uuid.uuid4().hex}/job")
        self.spec = JobSpec(
            run="job",
            entry="script",
            argv=("train.py",),
            cwd="/",
            store=self.store.url,
            nnodes=nnodes,
            spares=spares,
            nproc_per_node=2,
        )
        self.agents = [FakeAgent(f"n{i}") for i in range(nnodes + spares)]
        self.cluster = FakeCluster(*self.agents)
        self.secrets: dict[str, str] = {}
        self.lines: list[Message] = []
        self.statuses: list[Message] = []
        self.driver: Driver

    def quick(self) -> None:
        """Timers so short that silence is over in a moment."""
        timers = Timers(beat_s=0.1, fence_s=0.35, takeover_s=0.6, orphan_grace_s=1.0)
        self.spec = replace(self.spec, timers=timers)

    def make(self, observer: Callable[[Message, list[Message]], None] | None = None) -> Driver:
        self.driver = Driver(
            self.spec,
            cluster=self.cluster,
            store=self.store,
            token=TOKEN,
            opening=prepare(self.store),
            secrets=self.secrets,
            observer=observer,
        )
        for agent in self.agents:
            agent.attach(self.driver)
        return self.driver

    def run(self, script: Iterator[Callable[[Message, list[Message]], bool]]) -> int:
        """Each step of `script` is asked every turn until it is true; then comes the next."""
        pending = next(script, None)

        def observe(status: Message, lines: list[Message]) -> None:
            nonlocal pending
            self.lines += lines
            self.statuses.append(status)
            while pending is not None and pending(status, lines):
                pending = next(script, None)

        exit_code = self.make(observe).run()
        assert pending is None, "the job ended before the script did"
        return exit_code

    def close(self) -> None:
        for agent in self.agents:
            agent.die()

    def kinds(self) -> list[str]:
        return [line["kind"] for line in self.lines]


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    # Every turn is shown and turns are quick: a script's next step comes at once.
    monkeypatch.setattr("perdure.runtime.driver.SHOW_S", 0.0)
    monkeypatch.setattr("perdure.runtime.driver.POLL_S", 0.005)
    made: list[World] = []

    def make(**options: int) -> World:
        made.append(World(**options))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def until() -> Callable[[str], Callable[[Message, list[Message]], bool]]:
    """until("running"): the job is in that phase."""
    return lambda phase: lambda status, lines: status["phase"] == phase


@pytest.fixture
def fake_agent() -> type[FakeAgent]:
    return FakeAgent
