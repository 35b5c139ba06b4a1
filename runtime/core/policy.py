"""Why an attempt ended, whether another is tried, and who takes part: pure functions.

Each returns its decision with the reason in words; the same words reach the journal, the status and
the tests. Nothing here changes the state. What a message means is guessed from its text only where a
rank reports nothing better, and a guess blames no node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from perdure.runtime.core.events import ExitReport, Member, RestorePoint
from perdure.runtime.core.state import Blame, Cause, CoreState, Fault
from perdure.runtime.spec import JobSpec

# Weights of causes; see "Why it ended" in table.py.
RESTORE, OUTSIDE, START, ERROR, VICTIM, OURS = range(6)

CAPPED: frozenset[Blame] = frozenset({"user", "out_of_memory", "unknown"})
NO_PROGRESS = 93

_SIGNALS = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    4: "SIGILL",
    5: "SIGTRAP",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    10: "SIGUSR1",
    11: "SIGSEGV",
    12: "SIGUSR2",
    13: "SIGPIPE",
    15: "SIGTERM",
    24: "SIGXCPU",
    25: "SIGXFSZ",
    31: "SIGSYS",
}
_SIGABRT, _SIGTERM = 6, 15
# Sent by somebody else. The others a process brings upon itself, so the same again is the same bug.
_FROM_OUTSIDE = frozenset({1, 2, 3, 9, 10, 12, 15})

# What a rank says when it is a peer that died. Not a cause while anything else can be one.
_VICTIM = re.compile(
    r"connection (reset|closed|refused|aborted)|broken ?pipe|DistNetworkError|gloo.*(timed out|read)"
    r"|socket|ncclRemoteError|ncclSystemError|NCCL communicator was aborted|remote process exited"
    r"|Connection(Reset|Aborted|Refused)Error|HCCL.*(timeout|remote)|DistStoreError",
    re.IGNORECASE,
)
_BLAMES: tuple[tuple[Blame, re.Pattern[str]], ...] = (
    ("out_of_memory", re.compile(r"OutOfMemoryError|out of memory|^MemoryError", re.IGNORECASE)),
    ("device", re.compile(r"uncorrectable ECC|fallen off the bus|unspecified launch failure")),
    ("storage", re.compile(r"No space left on device|Stale file handle|Read-only file system")),
)
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")


def masked(text: str) -> str:
    """Without the numbers and addresses that differ from one attempt to the next."""
    return _VARYING.sub("#", text)


def signal_name(number: int) -> str:
    return _SIGNALS.get(number, f"signal {number}")


def cause_of_exit(report: ExitReport) -> Cause:
    """What one rank's end says by itself. `report` is no exit with 0."""
    who = f"rank {report.rank} on {report.node}"
    kind, weight, signature = "rank_exit", ERROR, ""
    blame: Blame = "user"
    if report.by_us and not report.error:
        blame, weight, kind = "network", OURS, "fenced"
        what = f"{who} was ended by its agent, which had lost the controller"
    elif report.oom:
        blame, weight, signature = "out_of_memory", OUTSIDE, "out_of_memory"
        what = f"{who} was ended by the kernel for want of memory"
    elif report.signal is not None and not report.by_us:
        name, kind = signal_name(report.signal), "rank_signal"
        blame = "preemption" if report.signal == _SIGTERM else "unknown"
        # An abort is often a watchdog's, on a victim: no better evidence than an exception.
        weight = ERROR if report.signal == _SIGABRT else OUTSIDE
        signature = "" if report.signal in _FROM_OUTSIDE else name
        what = f"{who} was ended by {name}"
    else:
        error, where = report.error or "", report.where or ""
        if _VICTIM.search(error):
            blame, weight = "network", VICTIM
        else:
            blame = next((b for b, text in _BLAMES if text.search(error)), "user")
            signature = f"exit {report.exit_code or 1} {masked(error)} {where}"
        tail = f": {error}" * bool(error) + f" ({where})" * bool(where)
        # We may have killed it while it was leaving with an error of its own: that error counts.
        what = f"{who} ended with exit code {report.exit_code or 1}{tail}"
    code = 128 + report.signal if report.signal and not report.by_us else report.exit_code or 1
    fault = Fault(
        at_s=report.at_s, kind=kind, blame=blame, rank=report.rank, node=report.node, because=what
    )
    return Cause(fault=fault, weight=weight, exit_code=code, signature=signature)


def cause_of_fault(fault: Fault, weight: int) -> Cause:
    """Something other than a rank's end. The same failed start again is the same failure."""
    signature = masked(fault.because) if weight == START else ""
    return Cause(fault=fault, weight=weight, exit_code=1, signature=signature)


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
