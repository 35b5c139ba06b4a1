"""One seed: a job, its faults, then no more faults, and it must end.

Phase one checks safety while things break. Phase two heals everything and demands progress: a job
that can finish does so within a bound, which is what "never stuck" means.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from perdure.runtime.core.commands import Command
from perdure.runtime.simulate.checks import Violation
from perdure.runtime.simulate.controller import Controller
from perdure.runtime.simulate.faults import KINDS, Faults
from perdure.runtime.simulate.parts import Script
from perdure.runtime.simulate.world import World
from perdure.runtime.spec import Budget, JobSpec, Timers


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    seed: int
    exit_code: int
    because: str
    attempts: int
    events: int
    virtual_s: float
    productive_s: float
    lost_s: dict[str, float]  # by the kind of fault
    fired: Counter[str]


def run_seed(seed: int, nodes: int | None = None, trace: bool = False) -> Outcome:
    """Raises Violation or InvariantBroken, or returns how the job ended. `nodes`: of the gang."""
    rng = random.Random(seed)
    nnodes = nodes or rng.choice([1, 1, 2, 2, 3, 4, 8])
    spares = rng.choice([0, 1, 1, 2])
    spec = JobSpec(
        run=f"sim-{seed}",
        entry="script",
        argv=("train.py",),
        cwd="/",
        store=f"memory://sim-{seed}",
        nnodes=nnodes,
        nproc_per_node=rng.choice([1, 2]),
        spares=spares,
        max_restarts=rng.choice([None, None, None, 20]),
        timers=Timers(start_s=60.0, place_s=400.0),
        budget=Budget(restarts=rng.choice([12, 40]), window_s=900.0),
    )
    total = rng.choice([200, 1000, 3000])
    script = Script(
        rate=rng.choice([2.0, 10.0]),
        total=total,
        save_every=rng.choice([50, 100]),
        takes_orders=rng.random() < 0.5,
        bug_at=rng.randrange(20, total) if rng.random() < 0.1 else None,
    )
    world = World(seed, spec, nnodes + spares + rng.choice([0, 1, 3]), script)
    kinds = rng.sample(sorted(KINDS), rng.randint(2, 7))
    if rng.random() < 0.7 and "stop" in kinds:
        kinds.remove("stop")  # it ends the job: interesting, but not in every second seed
    horizon = world.now + rng.choice([60.0, 200.0, 400.0])
    faults = Faults(world, rng, horizon, rng.choice([3.0, 10.0, 40.0]), kinds)
    if trace:
        _trace(world)
    world.controller = Controller(world, 1, None)
    world.controller.start()
    faults.begin()
    _beat(world)
    over = lambda: world.checks.finish is not None
    world.advance(horizon, over)
    faults.off()
    if world.controller is not None:
        world.controller.provide()
    # Long enough for the slowest honest way: a start, a place and an exclusion that run out, twice,
    # and all the work again.
    bound = 2 * (spec.timers.start_s + 120.0) + spec.timers.place_s + 3 * total / script.rate
    world.advance(world.now + bound, over)
    finish = world.checks.finish
    if finish is None:
        state = world.controller.core.state if world.controller else None
        raise Violation(
            f"not finished {bound:g} s after the last fault:"
            f" {state.phase if state else 'no controller'}: {state.because if state else ''}"
        )
    _expect(finish.exit_code, world, kinds)
    return _outcome(seed, world)


def _beat(world: World) -> None:
    world.sweep_leases()
    if world.controller is not None:
        world.controller.poll()
        if int(world.now) % 5 == 0:
            world.controller.provide()
    world.at(world.now + 1.0, lambda: _beat(world))


def _expect(code: int, world: World, kinds: list[str]) -> None:
    """An end must have its reason among what was done to the job."""
    fired = world.fired
    if code == 2 and not fired["restore_failed"]:
        raise Violation("ended with 2 although no restore failed")
    gone = ("node_kill", "node_vanish", "node_freeze", "node_cut", "switch_cut", "stop_ignored")
    if code == 75 and not any(fired[kind] for kind in gone):
        raise Violation("nothing to place the job on, and no node was lost for long")
    if world.script.bug_at is not None and code == 0 and 0 not in world.checks.stop_codes:
        raise Violation("a script that cannot finish has finished")
    quiet = not any(fired[kind] for kind in kinds) and world.script.bug_at is None
    if quiet and (code != 0 or len(world.checks.launched) != 1):
        raise Violation(f"nothing went wrong, and it ended with {code}")


def _outcome(seed: int, world: World) -> Outcome:
    assert world.checks.finish is not None and world.controller is not None
    rate = world.script.rate
    gangs = [world.gangs[a] for _, a, _ in world.checks.launched if a in world.gangs]
    lost: dict[str, float] = {}
    faults = world.controller.core.state.faults
    for i, gang in enumerate(gangs[:-1]):
        following = gangs[i + 1]
        end = gang.ended_at or following.began_at or world.now
        begin = following.began_at or end
        again = max(0.0, gang.base - (following.restore.step if following.restore else 0)) / rate
        kind = next((f.kind for f in reversed(faults) if f.at_s <= begin), "unseen")
        lost[kind] = lost.get(kind, 0.0) + (begin - end) + (again if gang.began_at else 0.0)
    reached = world.step_of(gangs[-1]) if gangs else 0.0
    return Outcome(
        seed=seed,
        exit_code=world.checks.finish.exit_code,
        because=world.checks.finish.because,
        attempts=len(world.checks.launched),
        events=world.controller.events,
        virtual_s=world.now - 1000.0,
        productive_s=reached / rate,
        lost_s=lost,
        fired=world.fired,
    )


def _trace(world: World) -> None:
    """Print every command as it is checked, and every fault as it fires."""
    inner = world.checks.command

    def command(one: Command) -> None:
        print(f"{world.now:9.3f}   {one}")
        inner(one)

    world.checks.command = command  # type: ignore[method-assign,assignment]
