"""What goes wrong, drawn from the seed: which kinds at all, how often, when, and to whom.

Each seed turns on its own subset of kinds (a "swarm"): faults of one kind alone find what a mixture
hides. A fault is counted when it has really hit something, never when it was merely planned.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from perdure.runtime.core.events import SaveAsked, StopAsked
from perdure.runtime.simulate.controller import Controller
from perdure.runtime.simulate.parts import Gang, Node
from perdure.runtime.simulate.world import World


@dataclass(slots=True)
class Faults:
    world: World
    rng: random.Random
    until: float
    every_s: float
    kinds: list[str]

    def begin(self) -> None:
        self.world.at(self.world.now + self.rng.expovariate(1 / self.every_s), self._next)

    def _next(self) -> None:
        if self.world.now >= self.until or self.world.checks.finish is not None:
            return
        kind = self.rng.choice(self.kinds)
        if KINDS[kind](self):
            self.world.fired[kind] += 1
        self.begin()

    def node(self, want: Callable[[Node], bool]) -> Node | None:
        fit = [n for n in self.world.nodes.values() if n.agent and want(n)]
        return self.rng.choice(fit) if fit else None

    def off(self) -> None:
        """Everything heals: from here on the job must finish."""
        world = self.world
        world.corrupt_next = 0
        for node in world.nodes.values():
            node.broken_until = min(node.broken_until, world.now)
            node.lose_acks = node.fail_launches = 0
            node.delay_acks_s = 0.0


def _rank(f: Faults, **how: object) -> bool:
    node = f.node(lambda n: bool(n.ranks) and n.hears(f.world.now))
    if node is None:
        return False
    f.world.end_rank(node, f.rng.choice(sorted(node.ranks)), **how)  # type: ignore[arg-type]
    return True


def _node_kill(f: Faults) -> bool:
    node = f.node(lambda n: True)
    if node is None:
        return False
    node.broken_until = f.world.now + f.rng.choice([0.0, 0.0, 20.0, 300.0])
    f.world.end_agent(node, refused=True)
    _comes_back(f, node.broken_until)
    return True


def _node_vanish(f: Faults) -> bool:
    node = f.node(lambda n: True)
    if node is None:
        return False
    node.broken_until = f.world.now + f.rng.choice([20.0, 120.0])
    f.world.end_agent(node, refused=False)
    _comes_back(f, node.broken_until)
    return True


def _comes_back(f: Faults, when: float) -> None:
    def provide() -> None:
        if f.world.controller is not None:
            f.world.controller.provide()

    f.world.at(when + 0.5, provide)


def _cut(f: Faults, freeze: bool) -> bool:
    world = f.world
    node = f.node(lambda n: n.hears(world.now))
    if node is None:
        return False
    until = world.now + f.rng.choice([1.0, 4.0, 8.0, 15.0, 60.0]) * f.rng.uniform(0.8, 1.2)
    if freeze:
        node.frozen_until = until
    else:
        node.cut_until, node.side = until, -1 - int(node.name[1:])
    gang = world.gangs.get(node.attempt) if node.attempt is not None else None
    if gang is not None:
        world.pause(gang)
        world.at(until, lambda: world.resume(gang))
    return True


def _switch_cut(f: Faults) -> bool:
    """A part of the cluster is cut off together: its nodes see each other, not the controller."""
    world = f.world
    up = [n for n in world.nodes.values() if n.hears(world.now)]
    if len(up) < 2:
        return False
    side = [n for n in up if n.attempt is not None and f.rng.random() < 0.9]
    side += [n for n in up if n.attempt is None and f.rng.random() < 0.3]
    until = world.now + f.rng.choice([5.0, 20.0, 100.0, 250.0])
    for node in side:
        node.cut_until, node.side = until, len(world.gangs) + 1
    for attempt in sorted({n.attempt for n in side if n.attempt is not None}):
        gang = world.gangs.get(attempt)
        if gang is not None:
            _anew(world, gang)
            world.at(until, lambda g=gang: _anew(world, g))  # type: ignore[misc]
    return bool(side)


def _anew(world: World, gang: Gang) -> None:
    world.pause(gang)
    world.resume(gang)


def _controller_kill(f: Faults) -> bool:
    world = f.world
    controller = world.controller
    if controller is None:
        return False
    snapshot = json_of(controller)
    lag = f.rng.uniform(0.0, 1.0)

    def die() -> None:
        if world.controller is not controller or world.checks.finish is not None:
            return
        world.controller = None
        world.checks.controllers += 1
        world.fired["controller_died"] += 1
        world.after(0.3, 8.0, rise)

    def rise() -> None:
        successor = Controller(world, controller.term + 1, snapshot)
        successor.events = controller.events
        world.controller = successor
        for node in world.nodes.values():
            node.starting = False
        successor.take_over()

    world.at(world.now + lag, die)
    return True


def json_of(controller: Controller) -> str:
    import json

    return json.dumps(controller.core.state.to_json())


def _stuck(f: Faults) -> bool:
    node = f.node(lambda n: bool(n.ranks))
    if node is None:
        return False
    node.stuck_until = f.world.now + f.rng.uniform(5.0, 40.0)
    return True


def _on_node(f: Faults, change: Callable[[Node], None]) -> bool:
    node = f.node(lambda n: True)
    if node is None:
        return False
    change(node)
    return True


def _lose_ack(node: Node) -> None:
    node.lose_acks += 1


def _fail_launch(node: Node) -> None:
    node.fail_launches += 1


def _delay_ack(f: Faults) -> bool:
    seconds = f.rng.choice([0.5, 5.0, 12.0])

    def delay(node: Node) -> None:
        node.delay_acks_s = seconds

    return _on_node(f, delay)


def _corrupt(f: Faults) -> bool:
    f.world.corrupt_next += 1
    return True


def _save(f: Faults) -> bool:
    if f.world.controller is None:
        return False
    f.world.controller.feed(SaveAsked(at_s=f.world.now, by="perdure save"))
    return True


def _stop(f: Faults) -> bool:
    if f.world.controller is None:
        return False
    code = f.rng.choice([0, 130, 143])
    f.world.checks.stop_codes.add(code)
    at_once = f.rng.random() < 0.3
    f.world.controller.feed(
        StopAsked(at_s=f.world.now, by="perdure stop", exit_code=code, at_once=at_once)
    )
    return True


def _request(f: Faults) -> bool:
    if f.world.controller is None:
        return False
    f.world.controller.fail_requests += 1
    return True


KINDS: dict[str, Callable[[Faults], bool]] = {
    "rank_kill": lambda f: _rank(f, signal=9),
    "rank_oom": lambda f: _rank(f, signal=9, oom=True),
    "rank_segfault": lambda f: _rank(f, signal=11),
    "rank_error": lambda f: _rank(f, code=1, error="OSError: flaky"),
    "node_kill": _node_kill,
    "node_vanish": _node_vanish,
    "node_cut": lambda f: _cut(f, freeze=False),
    "switch_cut": _switch_cut,
    "node_freeze": lambda f: _cut(f, freeze=True),
    "controller_kill": _controller_kill,
    "corrupt": _corrupt,
    "stuck": _stuck,
    "lose_ack": lambda f: _on_node(f, _lose_ack),
    "delay_ack": _delay_ack,
    "fail_launch": lambda f: _on_node(f, _fail_launch),
    "fail_request": _request,
    "save": _save,
    "stop": _stop,
}

# Counted where they take effect, which may be much later than the fault itself, or never.
EFFECTS = (
    "ack_lost",
    "ack_delayed",
    "commit_corrupted",
    "controller_died",
    "fenced",
    "late_launch",
    "launch_failed",
    "request_failed",
    "restore_failed",
    "script_bug",
    "stop_ignored",
)
