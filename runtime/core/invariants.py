"""What must hold after every step, whatever came in. Asserted in production, too.

Cheap by design: what a beat cannot change is not looked at on a beat. The simulator checks the same
promises from outside (`simulate/checks.py`), by what nodes really do; these are the core's own view.
"""

from __future__ import annotations

from perdure.runtime.core.commands import Command, Finish, LaunchGang, StopGang
from perdure.runtime.core.state import CoreState
from perdure.runtime.errors import InvariantBroken
from perdure.runtime.spec import JobSpec


def check(spec: JobSpec, state: CoreState, commands: list[Command]) -> None:
    """Raises InvariantBroken. Called after each step that said something."""
    if state.phase == "stopping" and not state.stopping:
        _broken("the core waits for a stop that nobody has to answer")
    if state.phase == "finished" and not isinstance(commands[-1], Finish):
        _broken("a finished job went on")
    if len(state.restarts) > spec.budget.restarts:
        _broken(f"{len(state.restarts)} restarts within {spec.budget.window_s:g} s")
    for at, command in enumerate(commands):
        if isinstance(command, LaunchGang):
            _check_launch(spec, state, command)
            if any(isinstance(later, LaunchGang) for later in commands[at + 1 :]):
                _broken("two gangs were launched in one step")
        elif isinstance(command, StopGang):
            _check_stop(state, command, commands)


def _check_stop(state: CoreState, stop: StopGang, commands: list[Command]) -> None:
    """A stop ends what was launched before it, and never the one that is launched beside it."""
    launched = any(isinstance(c, LaunchGang) and c.attempt <= stop.attempt for c in commands)
    if stop.attempt > (state.term, state.counter) or launched:
        _broken(f"a stop of {stop.attempt} while {state.attempt} is the newest")


def _check_launch(spec: JobSpec, state: CoreState, launch: LaunchGang) -> None:
    if state.stopping:
        _broken(f"attempt {launch.attempt} while {sorted(state.stopping)} had not stopped the last")
    if launch.attempt != (state.term, state.counter):
        _broken(f"attempt {launch.attempt} is not the next of {state.term}.{state.counter}")
    nodes = {m.node for m in launch.members}
    if unfit := nodes & (state.away | state.cleaning.keys() | state.excluded.keys()):
        _broken(f"{sorted(unfit)} in a gang: lost, unclean or excluded")
    if len(nodes) != spec.nnodes:
        _broken(f"a gang of {len(nodes)} nodes; the job has {spec.nnodes}")
    n = spec.nproc_per_node
    for i, member in enumerate(launch.members):
        if member[1:] != (i, i * n, n):
            _broken(f"{member} has ranks that are not its place's")
    if launch.restore in state.bad:
        _broken(f"{launch.restore} is marked bad and was to be restored")
    if launch.restore is None and state.had_commit:
        _broken("a run that has committed was to start from nothing")
    if state.exits or state.started or state.causes:
        _broken("what was known of an earlier attempt was held against the next")


def check_restore(state: CoreState) -> None:
    """Called before a launch: the restore point moves back only past a commit marked bad."""
    last, following = state.restore, state.line[0] if state.line else None
    if last is not None and last not in state.bad and (following is None or following < last):
        _broken(f"the restore point was to go back from {last} to {following}")


def _broken(what: str) -> None:
    raise InvariantBroken(
        f"invariant broken: {what}",
        hint="report this with the run's journal; `perdure resume` goes on from it",
    )
