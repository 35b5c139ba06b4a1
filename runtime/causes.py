"""What one fault says by itself: whose it is, how near to the root, and what it would look like again.

Guessed from a signal's number and an error's text, since a rank reports nothing better; so a guess
blames no node, and `core/policy.py` weighs it against all else that is known. Pure, and part of what
the core decides by; it stands beside the core because the words are torch's, NCCL's and gloo's, not
ours, and grow with them.
"""

from __future__ import annotations

import re

from perdure.runtime.core.events import ExitReport
from perdure.runtime.core.state import Blame, Cause, Fault

# Weights of causes; see "Why it ended" in core/table.py.
RESTORE, OUTSIDE, START, ERROR, VICTIM, OURS = range(6)


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
