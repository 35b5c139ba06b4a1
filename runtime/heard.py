"""An agent's message as the event it tells of, stamped on the driver's clock."""

from __future__ import annotations

from perdure.runtime.core import codec
from perdure.runtime.core.events import (
    CommandFailed,
    Event,
    ExitReport,
    GangStarted,
    GangStopped,
    RankExited,
    RestoreFailed,
)
from perdure.runtime.wire import Message


def event_of(node: str, message: Message, at_s: float) -> Event:
    """Raises KeyError, TypeError or ValueError when the message does not fit."""
    kind = message["kind"]
    attempt = codec.attempt_from_text(message["attempt"])
    if kind == "started":
        return GangStarted(at_s=at_s, attempt=attempt, node=node)
    if kind == "stopped":
        return GangStopped(at_s=at_s, attempt=attempt, node=node)
    if kind == "failed":
        why = str(message.get("why"))
        return CommandFailed(at_s=at_s, command="launch_gang", attempt=attempt, node=node, why=why)
    if kind == "exited":
        # Nodes' clocks differ: what is compared between them is when we heard of it.
        report = codec.decode(ExitReport, {**message["report"], "at": at_s, "node": node})
        return RankExited(at_s=at_s, attempt=attempt, report=report)
    if kind == "committed":
        raw = {"kind": "checkpoint_committed", "at": at_s, **_only(message, "step", "tier")}
        return codec.event_from_json({**raw, "attempt": message["attempt"]})
    if kind == "restore_failed":
        point = codec.restore_from_json(message["point"])
        if point is None:
            raise ValueError("no restore point is named")
        return RestoreFailed(
            at_s=at_s,
            attempt=attempt,
            point=point,
            rank=int(message["rank"]),
            why=str(message["why"]),
        )
    raise ValueError("no such message")


def _only(message: Message, *names: str) -> Message:
    return {name: message[name] for name in names if name in message}
