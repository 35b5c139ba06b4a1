"""Machines, agents, ranks and a store, as much of them as the core can notice, on a virtual clock.

One heap of future calls, one random generator: a run is a function of its seed. Nothing here knows
what the core decides or why; it performs what it is told as real agents do (the highest term is
obeyed, a stopped attempt never starts, a rank whose lease ran out leaves before its next step) and
suffers what `faults.py` does to it. Messages keep their order on a link; a cut or frozen node's wait
for it to come back, and die with their agent.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from perdure.runtime.core.commands import LaunchGang, StopGang
from perdure.runtime.core.events import (
    AgentAnswer,
    Attempt,
    CheckpointCommitted,
    CommandFailed,
    Event,
    ExitReport,
    GangStarted,
    GangStopped,
    NodeLost,
    RankExited,
    RestoreFailed,
    RestorePoint,
)
from perdure.runtime.simulate.checks import Checks
from perdure.runtime.simulate.parts import Gang, Node, Script
from perdure.runtime.simulate.store import Store
from perdure.runtime.spec import JobSpec

if TYPE_CHECKING:
    from perdure.runtime.simulate.controller import Controller


class World:
    def __init__(self, seed: int, spec: JobSpec, machines: int, script: Script) -> None:
        self.rng = random.Random(seed)
        self.spec = spec
        self.script = script
        self.now = 1000.0
        self.nodes = {f"n{i:05d}": Node(f"n{i:05d}") for i in range(machines)}
        self.store = Store()
        self.checks = Checks(spec, self)
        self.gangs: dict[Attempt, Gang] = {}
        self.controller: Controller | None = None
        self.corrupt_next = 0
        self.fired: Counter[str] = Counter()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    # Time.
    def at(self, when: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(when, self.now), self._count, call))

    def after(self, low: float, high: float, call: Callable[[], None]) -> None:
        self.at(self.now + self.rng.uniform(low, high), call)

    def advance(self, until: float, over: Callable[[], bool]) -> None:
        while self._heap and self._heap[0][0] <= until and not over():
            self.now, _, call = heapq.heappop(self._heap)
            call()
        if not over():
            self.now = until

    # Messages.
    def tell(self, node: Node, event: Event, *, ack: bool = False) -> None:
        """From an agent to the controller of the term it obeys."""
        if not node.agent:
            return
        if ack and node.lose_acks:
            node.lose_acks -= 1
            self.fired["ack_lost"] += 1
            return
        incarnation, late = node.incarnation, 0.0
        if ack and node.delay_acks_s:
            late, node.delay_acks_s = node.delay_acks_s, 0.0
            self.fired["ack_delayed"] += 1
        ready = max(self.now + late, node.cut_until, node.frozen_until, node.link_free_at)
        node.link_free_at = ready + self.rng.uniform(0.0005, 0.02)

        def deliver() -> None:
            if self.controller is not None and node.incarnation == incarnation:
                self.controller.receive(node, event)

        self.at(node.link_free_at, deliver)

    def send(self, node: Node, term: int, call: Callable[[Node], None]) -> None:
        """From a controller to an agent, which obeys the highest term that it has seen."""
        incarnation = node.incarnation

        def deliver() -> None:
            if not node.agent or node.incarnation != incarnation:
                return
            wait = max(node.cut_until, node.frozen_until)
            if wait > self.now:
                self.at(wait, deliver)
            elif term >= node.term:
                call(node)

        self.after(0.0005, 0.02, deliver)

    # What agents do.
    def launch(self, node: Node, command: LaunchGang) -> None:
        attempt = command.attempt
        if node.attempt is not None and attempt <= node.attempt or node.refuses(attempt):
            return
        if self.now >= node.lease_until:
            self.fired["late_launch"] += 1  # it lay in the link of a frozen node: too late to obey
            return
        self.checks.node_is_clean(attempt, node)
        node.attempt, node.members, node.restore = attempt, command.members, command.restore
        node.ranks, node.ended = set(), {}
        if node.fail_launches:
            node.fail_launches -= 1
            self.fired["launch_failed"] += 1
            why = "the code package could not be unpacked"
            failed = CommandFailed(
                at_s=self.now, command="launch_gang", attempt=attempt, node=node.name, why=why
            )
            self.tell(node, failed)
            return
        gang = self.gangs.setdefault(attempt, Gang(attempt, command.members, command.restore))
        incarnation = node.incarnation

        def spawn() -> None:
            if node.incarnation != incarnation or node.attempt != attempt:
                return
            if node.refuses(attempt) or not node.agent:
                return
            self.checks.ranks_start(attempt, node)
            (mine,) = (m for m in node.members if m.node == node.name)
            node.ranks = set(range(mine.first_rank, mine.first_rank + mine.nproc))
            self.tell(node, GangStarted(at_s=self.now, attempt=attempt, node=node.name), ack=True)
            self.after(0.2, 2.0, lambda: self._loaded(node, gang, incarnation))

        self.after(0.01, 0.3, spawn)

    def stop(self, node: Node, command: StopGang) -> None:
        if not node.refuses(command.attempt):
            node.stopped = command.attempt
        if self.now < node.stuck_until:
            self.fired["stop_ignored"] += 1
            return
        incarnation = node.incarnation

        def kill() -> None:
            if node.incarnation != incarnation or not node.agent:
                return
            if node.attempt is None or node.attempt <= command.attempt:
                for rank in sorted(node.ranks):
                    self.end_rank(node, rank, signal=15 if command.grace_s else 9, by_us=True)
            stopped = GangStopped(at_s=self.now, attempt=command.attempt, node=node.name)
            self.tell(node, stopped, ack=True)

        self.after(0.005, 0.1 + command.grace_s / 6, kill)

    def save(self, node: Node, attempt: Attempt) -> None:
        gang = self.gangs.get(attempt)
        if gang is not None and gang.since is not None and not gang.broken:
            at_step = int(self.step_of(gang) + 2 * self.script.rate)
            self._plan_save(gang, at_step)

    def end_rank(
        self,
        node: Node,
        rank: int,
        *,
        code: int | None = None,
        signal: int | None = None,
        by_us: bool = False,
        oom: bool = False,
        error: str | None = None,
    ) -> None:
        if rank not in node.ranks:
            return
        assert node.attempt is not None
        node.ranks.remove(rank)
        report = ExitReport(
            rank=rank,
            node=node.name,
            at_s=self.now,
            exit_code=code,
            signal=signal,
            by_us=by_us,
            oom=oom,
            error=error,
            where="train.py:31 in main" if error else None,
        )
        node.ended[rank] = report
        self.tell(node, RankExited(at_s=self.now, attempt=node.attempt, report=report))
        gang = self.gangs[node.attempt]
        if code != 0:
            self.break_gang(gang)

    def end_agent(self, node: Node, *, refused: bool) -> None:
        """The agent and all its ranks are gone; `refused`: its port says so at once."""
        if node.attempt is not None and node.ranks:
            self.break_gang(self.gangs[node.attempt])
        node.agent = False
        node.incarnation += 1
        node.ranks, node.ended, node.attempt, node.members = set(), {}, None, ()
        node.restore, node.term = None, 0
        node.lose_acks, node.delay_acks_s = 0, 0.0
        incarnation = node.incarnation

        def refuse() -> None:
            if self.controller is not None:
                lost = NodeLost(at_s=self.now, node=node.name, why="its port refuses")
                self.controller.lost(node, incarnation, lost)

        if refused:
            self.after(0.001, 0.5, refuse)

    def answer(self, node: Node) -> AgentAnswer:
        failed = any(r.exit_code != 0 for r in node.ended.values())
        running = node.attempt is not None and bool(node.ranks or node.ended) and not failed
        gang = self.gangs.get(node.attempt) if node.attempt is not None else None
        return AgentAnswer(
            node=node.name,
            attempt=node.attempt,
            members=node.members,
            restore=node.restore,
            running=running,
            step=int(self.step_of(gang)) if gang is not None else 0,
        )

    # What ranks do.
    def step_of(self, gang: Gang) -> float:
        if gang.since is None:
            return gang.base
        return gang.base + (self.now - gang.since) * self.script.rate

    def break_gang(self, gang: Gang) -> None:
        """A rank is gone: the others wait for it, and some find out by themselves."""
        if gang.broken or gang.done:
            return
        self.pause(gang)
        gang.broken = True
        gang.ended_at = self.now
        for member in gang.members:
            if self.rng.random() < 0.3:
                node, rank = self.nodes[member.node], member.first_rank
                self.after(0.05, 3.0, lambda n=node, r=rank: self._victim(gang, n, r))  # type: ignore[misc]

    def _victim(self, gang: Gang, node: Node, rank: int) -> None:
        if node.attempt == gang.attempt and node.hears(self.now):
            error = "RuntimeError: Connection closed by peer [10.0.0.7]:4711"
            self.end_rank(node, rank, code=1, error=error)

    def pause(self, gang: Gang) -> None:
        gang.base = self.step_of(gang)
        gang.since = None
        gang.generation += 1

    def resume(self, gang: Gang) -> None:
        """Steps go on once every member is there: after the load, a cut or a freeze."""
        nodes = [self.nodes[m.node] for m in gang.members]
        if gang.broken or gang.done or gang.since is not None or len(gang.loaded) < len(nodes):
            return
        if any(n.attempt != gang.attempt or not n.ranks for n in nodes):
            return
        if not all(nodes[0].sees(n, self.now) for n in nodes):
            return
        if late := [n for n in nodes if self.now >= n.lease_until]:
            for node in late:
                self.fence(node)
            return
        self.checks.gang_steps(gang.attempt)
        gang.since = self.now
        gang.began_at = gang.began_at or self.now
        script = self.script
        self._plan(gang, script.total, lambda: self._complete(gang))
        if script.bug_at is not None:
            self._plan(gang, max(script.bug_at, int(gang.base) + 1), lambda: self._bug(gang))
        first = int(gang.base) // script.save_every + 1
        self._plan_saves(gang, first * script.save_every)

    def _plan(self, gang: Gang, step: int, call: Callable[[], None]) -> None:
        generation = gang.generation
        when = self.now + max(0.0, step - self.step_of(gang)) / self.script.rate

        def act() -> None:
            if gang.generation == generation and gang.since is not None:
                call()

        self.at(when, act)

    def _plan_saves(self, gang: Gang, step: int) -> None:
        def due() -> None:
            self._save(gang, step)
            self._plan_saves(gang, step + self.script.save_every)

        if step <= self.script.total:
            self._plan(gang, step, due)

    def _plan_save(self, gang: Gang, step: int) -> None:
        self._plan(gang, step, lambda: self._save(gang, step))

    def _save(self, gang: Gang, step: int) -> None:
        """Staged on every node; it is committed once all have put it, whatever became of ranks."""
        point = RestorePoint(step, gang.attempt)
        staged = [(self.nodes[m.node], self.nodes[m.node].incarnation) for m in gang.members]

        def put() -> None:
            if any(node.incarnation != incarnation for node, incarnation in staged):
                return
            if any(not node.hears(self.now) for node, _ in staged):
                self.after(1.0, 2.0, put)
                return
            if point in self.store.commits:
                return
            self.store.commits[point] = self.corrupt_next > 0
            if self.corrupt_next > 0:
                self.corrupt_next -= 1
                self.fired["commit_corrupted"] += 1
            committed = CheckpointCommitted(at_s=self.now, attempt=point.attempt, step=step)
            self.tell(staged[0][0], committed)

        self.after(0.3, 4.0, put)

    def _loaded(self, node: Node, gang: Gang, incarnation: int) -> None:
        if node.incarnation != incarnation or node.attempt != gang.attempt or not node.ranks:
            return
        if not node.hears(self.now):
            wake = max(node.cut_until, node.frozen_until)
            self.at(wake, lambda: self._loaded(node, gang, incarnation))
            return
        point = gang.restore
        if point is not None and self.store.commits[point]:
            self.fired["restore_failed"] += 1
            rank = min(node.ranks)
            why = "w0.safetensors: block 17 does not match its checksum"
            failed = RestoreFailed(
                at_s=self.now, attempt=gang.attempt, point=point, rank=rank, why=why
            )
            self.tell(node, failed)
            self.end_rank(node, rank, code=1, error=f"RestoreError: {why}")
            return
        if not gang.loaded:
            gang.base = float(point.step if point is not None else 0)
        gang.loaded.add(node.name)
        self.resume(gang)

    def _bug(self, gang: Gang) -> None:
        node = self.nodes[gang.members[-1].node]
        self.fired["script_bug"] += 1
        rank = gang.members[-1].first_rank
        self.end_rank(node, rank, code=1, error=f"ValueError: bad sample {self.rng.random()}")

    def _complete(self, gang: Gang) -> None:
        self.pause(gang)
        gang.done = True
        gang.ended_at = self.now
        for member in gang.members:
            node = self.nodes[member.node]
            for rank in range(member.first_rank, member.first_rank + member.nproc):
                self.after(0.01, 0.5, lambda n=node, r=rank: self._leave(gang, n, r))  # type: ignore[misc]

    def _leave(self, gang: Gang, node: Node, rank: int) -> None:
        if node.attempt == gang.attempt and rank in node.ranks:
            self.end_rank(node, rank, code=0)
            self.checks.rank_done(gang.attempt, rank)

    # What time does.
    def sweep_leases(self) -> None:
        """Agents whose lease ran out end their ranks; a majority of a gang may go on for a while."""
        timers = self.spec.timers
        for node in self.nodes.values():
            if not node.ranks or self.now < node.frozen_until:
                continue
            silent_s = self.now - node.answered
            if silent_s > 2 * timers.beat_s and self.now < node.lease_until:
                peers = [self.nodes[m.node] for m in node.members]
                up = sum(node.sees(p, self.now) and bool(p.ranks) for p in peers)
                if len(peers) > 1 and 2 * up > len(peers):
                    grace = node.answered + timers.orphan_grace_s
                    node.lease_until = min(self.now + timers.fence_s, grace)
            if self.now >= node.lease_until:
                self.fence(node)

    def fence(self, node: Node) -> None:
        """A rank that wakes after its lease leaves before its next step."""
        self.fired["fenced"] += 1
        for rank in sorted(node.ranks):
            self.end_rank(node, rank, signal=9, by_us=True)
