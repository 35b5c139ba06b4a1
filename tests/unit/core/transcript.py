"""The language of tests/scenarios/*.txt: events in, commands out.

    # why this scenario exists
    spec nnodes=2 nproc_per_node=2
    0 started term=1 counter=0 line=- by=run
        request_nodes count=2 exclude=- because="run"

A line that begins with a number is an event at that second; the indented lines are what the core
answered, ending with its phase when that changed. `restart` replaces the core by one that is loaded
from its snapshot. Values: `-` is empty, `40@1.1` a commit, `a:2,b:2` pairs; `answers` of a takeover
are `node/attempt/running or broken/step`, of the gang that `members` names (default: the core's).
"""

from __future__ import annotations

import json
import shlex
from dataclasses import fields

from perdure.runtime.core import codec
from perdure.runtime.core.commands import Command, LaunchGang
from perdure.runtime.core.core import Core
from perdure.runtime.core.events import (
    AgentAnswer,
    Attempt,
    Event,
    ExitReport,
    Member,
    RankExited,
    RestorePoint,
    TookOver,
)
from perdure.runtime.core.state import CoreState
from perdure.runtime.spec import Budget, JobSpec, Timers

_NUMBERS = frozenset({"term", "counter", "step", "rank", "signal", "exit_code"})
_FLAGS = frozenset({"can_save", "at_once", "by_us", "oom"})
_REPORT = frozenset(f.name for f in fields(ExitReport))
_TIMERS = frozenset(f.name for f in fields(Timers))
_BUDGET = frozenset(f.name for f in fields(Budget))


def play(text: str) -> str:
    """The same transcript with today's answers in place of the written ones."""
    core: Core | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("    "):
            continue
        lines.append(line)
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "spec":
            core = Core(_spec(_pairs(words[1:])))
            continue
        assert core is not None, "the spec comes first"
        if words[0] == "restart":
            snapshot = json.loads(json.dumps(core.state.to_json()))
            core = Core(core.spec, CoreState.from_json(snapshot))
            continue
        phase = core.state.phase
        commands = core.step(_event(core, float(words[0]), words[1], _pairs(words[2:])))
        lines += [f"    {show(command)}" for command in commands]
        if core.state.phase != phase:
            lines.append(f"    = {core.state.phase}")
    return "\n".join(lines) + "\n"


def show(command: Command) -> str:
    raw = codec.to_json(command)
    parts = [str(raw.pop("kind"))]
    if isinstance(command, LaunchGang):
        raw["members"] = " ".join(f"{m.node}:{m.first_rank}" for m in command.members)
    for key, value in raw.items():
        if isinstance(value, dict):
            value = f"{value['step']}@{value['attempt']}"
        elif isinstance(value, list):
            value = ",".join(str(one) for one in value)
        text = "-" if value in (None, "") else str(value)
        parts.append(f'{key}="{text}"' if key == "because" else f"{key}={text}")
    return " ".join(parts)


def _pairs(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def _spec(given: dict[str, str]) -> JobSpec:
    timers = {k: float(v) for k, v in given.items() if k in _TIMERS}
    budget = {k: int(v) for k, v in given.items() if k in _BUDGET}
    sizes = {k: int(v) for k, v in given.items() if k not in _TIMERS | _BUDGET}
    return JobSpec(
        run="scenario",
        entry="script",
        argv=("train.py",),
        cwd="/",
        store="memory://scenario",
        timers=Timers(**timers),
        budget=Budget(**budget),  # type: ignore[arg-type]
        **sizes,  # type: ignore[arg-type]
    )


def _event(core: Core, at_s: float, kind: str, given: dict[str, str]) -> Event:
    if kind == "rank_exited":
        return _exit(at_s, given)
    if kind == "took_over":
        return _took_over(core, at_s, given)
    raw: codec.JsonObject = {"kind": kind, "at": at_s}
    for key, text in given.items():
        raw[key] = _value(key, text)
    if kind == "beats_seen":
        raw.setdefault("steps_per_s", 10.0)
    return codec.event_from_json(raw)


def _value(key: str, text: str) -> codec.Json:
    if key in _NUMBERS:
        return int(text)
    if key in _FLAGS:
        return text == "yes"
    if key == "line":
        return [codec.encode(p) for p in _points(text)]
    if key == "point":
        return codec.encode(_points(text)[0])
    if key == "nodes":
        return [[n, int(slots)] for n, slots in _two(text)]
    if key == "late":
        return [[n, float(s)] for n, s in _two(text)]
    return text


def _two(text: str) -> list[tuple[str, str]]:
    if text == "-":
        return []
    return [(one.split(":")[0], one.split(":")[1]) for one in text.split(",")]


def _points(text: str) -> tuple[RestorePoint, ...]:
    if text == "-":
        return ()
    parts = [one.split("@") for one in text.split(",")]
    return tuple(RestorePoint(int(s), codec.attempt_from_text(a)) for s, a in parts)


def _exit(at_s: float, given: dict[str, str]) -> RankExited:
    report = {"at": at_s, **{k: _value(k, v) for k, v in given.items() if k in _REPORT}}
    return RankExited(
        at_s=at_s,
        attempt=codec.attempt_from_text(given["attempt"]),
        report=codec.decode(ExitReport, report),
    )


def _took_over(core: Core, at_s: float, given: dict[str, str]) -> TookOver:
    members = core.state.members
    restore = core.state.restore
    if "members" in given:
        n = core.spec.nproc_per_node
        names = given["members"].split(",")
        members = tuple(Member(name, i, i * n, n) for i, name in enumerate(names))
        restore = next(iter(_points(given.get("restore", "-"))), None)
    answers: list[AgentAnswer] = []
    for one in [] if given["answers"] == "-" else given["answers"].split(","):
        node, attempt, how, step = one.split("/")
        told: Attempt | None = None if attempt == "-" else codec.attempt_from_text(attempt)
        answers.append(
            AgentAnswer(
                node=node,
                attempt=told,
                members=members if told is not None else (),
                restore=restore if told is not None else None,
                running=how == "running",
                step=int(step),
            )
        )
    line = _points(given["line"])
    return TookOver(at_s=at_s, term=int(given["term"]), answers=tuple(answers), line=line)
