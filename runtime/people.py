"""The job as people and programs are shown it: the `status` object of DESIGN part 6."""

from __future__ import annotations

from typing import Any

from perdure.runtime.beats import Beats
from perdure.runtime.core import codec
from perdure.runtime.core.state import Status
from perdure.runtime.spec import JobSpec


def status_json(
    spec: JobSpec,
    status: Status,
    beats: Beats | None,
    *,
    waiting_for: str,
    logs: dict[int, str],
    journal_problem: str,
) -> dict[str, Any]:
    """`logs`: the newest attempt's folders by rank."""
    total = beats.newest("total") if beats is not None else None
    commit = status.commit
    return {
        "run": spec.run,
        "phase": status.phase,
        "because": status.because,
        "attempt": None if status.attempt is None else str(status.attempt),
        "step": status.step,
        "steps_per_s": round(status.steps_per_s, 3),
        "total_steps": int(total) if total else None,
        "loss": beats.newest("loss") if beats is not None else None,
        "can_save": beats.can_save if beats is not None else False,
        "world_size": spec.world_size,
        "nodes": [member.node for member in status.members],
        "spares": list(status.spares),
        "waiting_for": status.waiting_for or waiting_for,
        "restarts": status.restarts,
        "faults": codec.encode(status.faults),
        "checkpoint": None
        if commit is None
        else {
            "step": commit.step,
            "attempt": str(commit.attempt),
            "tier": "store",
            "at": status.committed_at_s,
        },
        "restored": codec.encode(status.restore),
        "root_cause": _root_cause(status, logs),
        "exit_code": status.exit_code,
        "store": spec.store,
        "log_dir": spec.log_dir,
        "journal_problem": journal_problem,
    }


def _root_cause(status: Status, logs: dict[int, str]) -> dict[str, Any] | None:
    root = status.root_cause
    if root is None:
        return None
    return {
        "rank": root.rank,
        "node": root.node,
        "error": root.error,
        "where": root.where,
        "traceback": root.traceback,
        "exit_code": root.exit_code,
        "signal": root.signal,
        "log": logs.get(root.rank),
    }
