"""The driver's part in the simulation: events to the core, its commands to the world, once a turn.

It does what `runtime/driver.py` promises the core (see `table.py` and `Core`): a Tick last in a turn,
no ack for a node that is excluded or lost, and a takeover that leaves out only those that refuse or
stay silent for takeover_s.
"""

from __future__ import annotations

import json

from perdure.runtime.core.commands import (
    Command,
    LaunchGang,
    MarkBad,
    RequestNodes,
    SaveNow,
    StopGang,
)
from perdure.runtime.core.core import Core
from perdure.runtime.core.events import (
    BeatsSeen,
    CheckpointCommitted,
    CommandFailed,
    Event,
    NodeLost,
    NodeOffer,
    NodesOffered,
    RankExited,
    RestorePoint,
    Started,
    Tick,
    TookOver,
)
from perdure.runtime.core.state import CoreState
from perdure.runtime.simulate.parts import Node
from perdure.runtime.simulate.world import World


class Controller:
    def __init__(self, world: World, term: int, snapshot: str | None) -> None:
        self.world = world
        self.term = term
        state = CoreState.from_json(json.loads(snapshot)) if snapshot is not None else None
        self.core = Core(world.spec, state)
        self.heard: dict[str, float] = {}  # linked nodes, and when each was last heard
        self.offered: tuple[NodeOffer, ...] = ()
        self.excluded: frozenset[str] = frozenset()
        self.events = 0
        self.first_of_term = True
        self.fail_requests = 0
        self._waiting: list[Event] | None = None  # while the agents are asked

    # Beginning.
    def start(self) -> None:
        self.feed(
            Started(at_s=self.world.now, term=self.term, counter=0, line=(), by="run"),
        )

    def take_over(self) -> None:
        """Ask every node; those that neither answer nor refuse are given takeover_s."""
        world = self.world
        self._waiting = []
        silent = [n for n in world.nodes.values() if n.agent and not n.hears(world.now)]
        patience = world.spec.timers.takeover_s if silent else 0.3
        self._ask_all()
        for node in silent:
            world.at(max(node.cut_until, node.frozen_until), self._ask_all)
        world.after(patience, patience + 0.2, self._took_over)

    def _ask_all(self) -> None:
        if self.world.controller is self and self._waiting is not None:
            for node in self.world.nodes.values():
                if node.hears(self.world.now):
                    self._link(node)

    def _link(self, node: Node) -> None:
        node.term = max(node.term, self.term)
        if node.ranks and self.world.now >= node.lease_until:
            self.world.fence(node)  # a lease that ran out is never renewed for the same ranks
        self.heard[node.name] = self.world.now
        node.answered = self.world.now
        node.lease_until = self.world.now + self.world.spec.timers.fence_s

    def _took_over(self) -> None:
        world = self.world
        if world.controller is not self or self._waiting is None:
            return
        self._ask_all()
        answered = [world.nodes[n] for n in sorted(self.heard) if world.nodes[n].agent]
        waiting, self._waiting = self._waiting, None
        answers = tuple(world.answer(node) for node in answered)
        line = world.store.line()
        world.store.told.update(line)
        self.feed(TookOver(at_s=world.now, term=self.term, answers=answers, line=line))
        for event in waiting:
            self.feed(event)
        for node in answered:
            for rank in sorted(node.ended):
                assert node.attempt is not None
                report = node.ended[rank]
                self.feed(RankExited(at_s=world.now, attempt=node.attempt, report=report))
        self.offer()

    # Turns.
    def receive(self, node: Node, event: Event) -> None:
        if node.name in self.heard:
            self.heard[node.name] = self.world.now
            if isinstance(event, CheckpointCommitted):
                self.world.store.told.add(RestorePoint(event.step, event.attempt))
            self.feed(event)

    def lost(self, node: Node, incarnation: int, event: NodeLost) -> None:
        if node.name in self.heard and node.incarnation == incarnation and not node.agent:
            del self.heard[node.name]
            self.feed(event)
            self.offer()

    def agent_up(self, node: Node) -> None:
        if node.name not in self.excluded and self._waiting is None:
            self._link(node)
            self.offer()

    def offer(self) -> None:
        if self._waiting is not None:
            return
        slots = self.world.spec.nproc_per_node
        offered = tuple(NodeOffer(name, slots) for name in sorted(self.heard))
        if offered != self.offered:
            self.offered = offered
            self.feed(NodesOffered(at_s=self.world.now, nodes=offered, waiting_for="nodes"))

    def poll(self) -> None:
        """Once a beat: acks, beats, then the Tick if one is due."""
        world, core = self.world, self.core
        now, fence_s = world.now, world.spec.timers.fence_s
        late: list[tuple[str, float]] = []
        for name, heard in self.heard.items():
            node = world.nodes[name]
            if node.hears(now):
                self.heard[name] = now
                node.answered = now
                node.lease_until = now + fence_s
            elif now - heard > 3 * world.spec.timers.beat_s:
                late.append((name, now - heard))
        if self._waiting is not None:
            return
        attempt = core.state.attempt
        if attempt is not None:
            gang = world.gangs.get(attempt)
            stepping = gang is not None and gang.since is not None
            step = int(world.step_of(gang)) if gang is not None and gang.loaded else 0
            rate = world.script.rate if stepping else 0.0
            self.feed(
                BeatsSeen(
                    at_s=now,
                    attempt=attempt,
                    step=step,
                    steps_per_s=rate,
                    late=tuple(late),
                    can_save=world.script.takes_orders and stepping,
                )
            )
        due = core.deadline_s()
        if due is not None and due <= now:
            self.feed(Tick(at_s=now))
            after = core.deadline_s()
            assert after is None or after > now, "a Tick left its own deadline in the past"

    def feed(self, event: Event) -> None:
        if self._waiting is not None:
            self._waiting.append(event)
            return
        if self.world.controller is not self:
            return
        self.events += 1
        for command in self.core.step(event):
            self.world.checks.command(command)
            self._perform(command)

    # Commands.
    def _perform(self, command: Command) -> None:
        world, term = self.world, self.term
        if isinstance(command, RequestNodes):
            self._request(command)
        elif isinstance(command, LaunchGang):
            self._record(command)
            for member in command.members:
                world.send(world.nodes[member.node], term, lambda n: world.launch(n, command))
        elif isinstance(command, StopGang):
            for name in command.nodes:
                if name in self.heard:
                    world.send(world.nodes[name], term, lambda n: world.stop(n, command))
        elif isinstance(command, SaveNow):
            first = self.core.state.members[0].node
            world.send(world.nodes[first], term, lambda n: world.save(n, command.attempt))
        elif isinstance(command, MarkBad):
            world.store.bad.add(command.point)

    def _record(self, launch: LaunchGang) -> None:
        """The attempt's record: at once for the first of a term, else a little later."""
        world = self.world

        def write() -> None:
            world.store.restored[launch.attempt] = launch.restore

        if self.first_of_term:
            write()
        else:
            world.after(0.01, 0.5, write)
        self.first_of_term = False

    def _request(self, command: RequestNodes) -> None:
        world = self.world
        if self.fail_requests:
            self.fail_requests -= 1
            world.fired["request_failed"] += 1
            failed = CommandFailed(
                at_s=world.now, command="request_nodes", attempt=None, node=None, why="no quota"
            )
            world.after(0.01, 0.1, lambda: self.feed(failed))
        self.excluded = frozenset(command.exclude)
        for name in command.exclude:
            self.heard.pop(name, None)
            node = world.nodes[name]
            if node.agent:
                world.after(0.1, 5.0, lambda n=node, i=node.incarnation: self._end(n, i))  # type: ignore[misc]
        world.at(world.now, self.offer)
        world.at(world.now, self.provide)

    def _end(self, node: Node, incarnation: int) -> None:
        if node.incarnation == incarnation and node.hears(self.world.now):
            self.world.end_agent(node, refused=False)

    def provide(self) -> None:
        """The cluster's part: agents on as many whole machines as were asked for."""
        world = self.world
        count = world.spec.nnodes + world.spec.spares
        up = sum(node.name in self.heard or node.starting for node in world.nodes.values())
        for node in world.nodes.values():
            if up >= count:
                return
            free = node.name not in self.heard and not node.starting
            if free and node.name not in self.excluded and world.now >= node.broken_until:
                if node.agent and not node.hears(world.now):
                    continue
                up += 1
                node.starting = True
                world.after(0.5, 3.0, lambda n=node: self._agent_up(n))  # type: ignore[misc]

    def _agent_up(self, node: Node) -> None:
        world = self.world
        node.starting = False
        if world.now < node.broken_until or not (not node.agent or node.hears(world.now)):
            return
        node.agent = True
        if world.controller is not None:
            world.controller.agent_up(node)
