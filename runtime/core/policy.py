"""Why an attempt ended, whether another is tried, and who takes part: pure functions.

Each returns its decision with the reason in words; the same words reach the journal, the status and
the tests. Nothing here changes the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from perdure.runtime.causes import OURS, START, cause_of_exit, cause_of_fault
from perdure.runtime.core.events import ExitReport, Member, RestorePoint
from perdure.runtime.core.state import Blame, Cause, CoreState, Fault
from perdure.runtime.spec import JobSpec

CAPPED: frozenset[Blame] = frozenset({"user", "out_of_memory", "unknown"})
NO_PROGRESS = 93


def judge(causes: Iterable[Cause], exits: Mapping[int, ExitReport], now_s: float) -> Cause:
    """The root among all that is known: lowest weight, then earliest, then lowest rank."""
    known = list(causes)
    known += [cause_of_exit(r) for r in exits.values() if r.exit_code != 0]
    if not known:
        why = "the gang ended and nobody could say why"
        fault = Fault(at_s=now_s, kind="unseen", blame="unknown", rank=None, node=None, because=why)
        return cause_of_fault(fault, OURS)
    return min(known, key=lambda c: (c.weight, c.fault.at_s, c.fault.rank or 0, c.fault.node or ""))


def reached(state: CoreState) -> int:
    """The step of the whole run that the newest attempt came to.

    A script may count from its checkpoint on, or from 0 each time: then its first count is lower.
    """
    base = state.restore.step if state.restore is not None else 0
    if state.first_step is None:
        return base
    return state.step + (base if state.first_step < base else 0)


def is_barren(spec: JobSpec, state: CoreState, cause: Cause) -> bool:
    newer = bool(state.line) and state.line[0] != state.restore
    gained = reached(state) - state.furthest
    return bool(cause.signature) and not newer and gained < spec.budget.no_progress_steps


def give_up(spec: JobSpec, state: CoreState, cause: Cause) -> tuple[int, str] | None:
    """(exit code, reason) when no further attempt may be made; None when one may.

    Expects `state.restarts` to hold the window's restarts and `state.barren` to include `cause`.
    """
    why = cause.fault.because
    cap = spec.max_restarts
    if cap is not None and is_capped(cause) and state.script_restarts >= cap:
        return cause.exit_code, f"{why}; --max-restarts {cap} is used up"
    attempts = spec.budget.no_progress_attempts
    if len(state.barren) >= attempts and len(set(state.barren[-attempts:])) == 1:
        return NO_PROGRESS, f"{attempts} attempts in a row made no progress: {why}"
    if len(state.restarts) >= spec.budget.restarts:
        return NO_PROGRESS, (
            f"{len(state.restarts)} restarts within {spec.budget.window_s:g} s; the last: {why}"
        )
    return None


def is_capped(cause: Cause) -> bool:
    """Whether a restart for it counts against --max-restarts."""
    return cause.fault.blame in CAPPED and cause.weight not in (START, OURS)


def choose_gang(spec: JobSpec, state: CoreState, usable: Iterable[str]) -> tuple[Member, ...]:
    """The next gang, or () when the usable nodes are too few."""
    free = set(usable)
    if len(free) < spec.nnodes:
        return ()
    failed = {c.fault.node for c in state.causes if c.weight == START}
    places: list[str | None] = [None] * spec.nnodes
    for member in state.members:
        if member.node in free and member.node not in failed and member.group_rank < spec.nnodes:
            places[member.group_rank] = member.node
            free.remove(member.node)
    rest = iter(sorted(free, key=lambda n: (n in failed, state.losses.get(n, 0), n)))
    n = spec.nproc_per_node
    return tuple(Member(node or next(rest), i, i * n, n) for i, node in enumerate(places))


def keeps_on_line(state: CoreState, point: RestorePoint) -> bool:
    """Whether a commit that arrives now belongs to the line; see "Checkpoints" in table.py."""
    if point in state.bad or point in state.line:
        return False
    if point.attempt == state.attempt:
        return True
    return any(p.attempt == point.attempt and p.step > point.step for p in state.line)
