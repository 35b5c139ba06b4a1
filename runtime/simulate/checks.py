"""What must never happen, checked by what nodes really do and not by what the core believes.

The core asserts its own view (`core/invariants.py`); a wrong belief would pass there. These look at
the machines, the store and the commands from outside, at each launch, each step of a gang and each
end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perdure.runtime.core.commands import Command, Finish, LaunchGang
from perdure.runtime.core.events import Attempt, RestorePoint
from perdure.runtime.spec import JobSpec

if TYPE_CHECKING:
    from perdure.runtime.simulate.parts import Node
    from perdure.runtime.simulate.world import World


class Violation(AssertionError):
    """A promise was broken; the message says which, and when."""


class Checks:
    def __init__(self, spec: JobSpec, world: World) -> None:
        self.spec = spec
        self.world = world
        self.launched: list[tuple[float, Attempt, RestorePoint | None]] = []
        self.controllers = 0  # each that died may take one launch of the last second with it
        self.done: dict[Attempt, set[int]] = {}
        self.finish: Finish | None = None
        self.stop_codes: set[int] = set()

    def _fail(self, what: str) -> None:
        raise Violation(f"at {self.world.now:.3f} s: {what}")

    def command(self, command: Command) -> None:
        if self.finish is not None and not isinstance(command, Finish):
            self._fail(f"{command} after the job had finished")
        if isinstance(command, LaunchGang):
            self._launch(command)
        elif isinstance(command, Finish):
            self._finish(command)

    def node_is_clean(self, attempt: Attempt, node: Node) -> None:
        """Every process of an earlier attempt had ended before this one was launched here."""
        if node.ranks:
            self._fail(f"{attempt} is launched on {node.name}, where {node.attempt} has ranks")

    def ranks_start(self, attempt: Attempt, node: Node) -> None:
        """No process of an older attempt can make another step anywhere.

        A gang that lost a rank cannot: a step needs all of them.
        """
        for other in self.world.nodes.values():
            if not other.ranks or other.attempt == attempt or other.attempt is None:
                continue
            gang = self.world.gangs[other.attempt]
            peers = [self.world.nodes[m.node] for m in gang.members]
            whole = not gang.broken and all(p.ranks and p.attempt == gang.attempt for p in peers)
            if whole and self.world.now < other.lease_until:
                self._fail(
                    f"{node.name} starts {attempt} while {other.name} may still step in"
                    f" {other.attempt}"
                )

    def gang_steps(self, attempt: Attempt) -> None:
        for gang in self.world.gangs.values():
            if gang.since is not None and gang.attempt != attempt:
                self._fail(f"{attempt} steps while {gang.attempt} steps")

    def rank_done(self, attempt: Attempt, rank: int) -> None:
        self.done.setdefault(attempt, set()).add(rank)

    def _launch(self, launch: LaunchGang) -> None:
        now, store = self.world.now, self.world.store
        if self.launched and launch.attempt <= self.launched[-1][1]:
            self._fail(f"{launch.attempt} after {self.launched[-1][1]}")
        point = launch.restore
        if point is not None and point not in store.commits:
            self._fail(f"{point} was never committed and is to be restored")
        if point is not None and point in store.bad:
            self._fail(f"{point} is marked bad and is to be restored")
        line = [p for p in store.line({a: p for _, a, p in self.launched}) if p in store.told]
        if line and (point is None or point < line[0]):
            self._fail(f"{launch.attempt} begins from {point}, and {line[0]} was there")
        if self.launched:
            last = self.launched[-1][2]
            if last is not None and last not in store.bad and (point is None or point < last):
                self._fail(f"the restore point went back from {last} to {point}")
        if point is not None and point not in line:
            self._fail(f"{point} is not on the line {line[:3]}")
        self.launched.append((now, launch.attempt, point))
        since = now - self.spec.budget.window_s
        recent = sum(at > since for at, _, _ in self.launched)
        if recent > self.spec.budget.restarts + 1 + self.controllers:
            self._fail(f"{recent} launches within {self.spec.budget.window_s:g} s")
        if len({m.node for m in launch.members}) != self.spec.nnodes:
            self._fail(f"a gang on {launch.members}")

    def _finish(self, finish: Finish) -> None:
        self.finish = finish
        world = self.world
        code = finish.exit_code
        if code == 0 and 0 not in self.stop_codes:
            ranks = max((len(done) for done in self.done.values()), default=0)
            if ranks != self.spec.world_size:
                self._fail(f"finished with 0 when {ranks} ranks had ended well")
        elif code == 2 and (known := [p for p in world.store.line() if p in world.store.told]):
            self._fail(f"gave up although {known[0]} can be restored")
        elif code in (130, 143) and code not in self.stop_codes:
            self._fail(f"ended with {code} though nobody asked")
        elif code not in (0, 1, 2, 75, 93, 130, 137, 139, 143):
            self._fail(f"ended with {code}")
