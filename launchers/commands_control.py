"""stop and save: asked of the controller, then watched until it is done, with a bound.

A stop keeps the run: it ends with a checkpoint where the script takes orders to save, and `perdure
resume` goes on from there. The exit code says whether what was asked has happened.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from perdure.launchers.commands_ask import status_of
from perdure.launchers.commands_watch import turns
from perdure.launchers.options import Given
from perdure.launchers.runs import Found, find, must_connect
from perdure.launchers.view import RunView, span
from perdure.runtime.errors import RunProblem

STOP_S = 180.0  # a save, SIGTERM and its grace, SIGKILL, and the last uploads
SAVE_S = 600.0
DUE_S = 30.0  # a script that has not asked run.due for so long does not use it


def stop(given: Given) -> int:
    found = find(given.target)
    before = RunView.read(status_of(found))
    if before.phase == "finished":
        raise RunProblem(
            f"run {found.run} has ended already, with exit code {before.exit_code}",
            hint=f"see `perdure why {found.run}`; `perdure resume {found.run}` goes on with it",
        )
    client = must_connect(found, "stop")
    try:
        client.stop(by="perdure stop", exit_code=0, at_once=given.flag("now"))
    finally:
        client.close()
    view = _until(found, lambda now: now.phase == "finished", STOP_S)
    if view is None:
        raise RunProblem(
            f"run {found.run} was told to stop and has not within {span(STOP_S)}",
            hint=f"see `perdure status {found.run}`; `perdure stop --now {found.run}` waits for "
            "nothing",
        )
    saved = "no checkpoint" if view.checkpoint_step is None else f"step {view.checkpoint_step:,}"
    _report(given, view, f"run {found.run} is stopped; last checkpoint: {saved}")
    return 0


def save(given: Given) -> int:
    found = find(given.target)
    before = RunView.read(status_of(found))
    if before.phase != "running":
        raise RunProblem(
            f"run {found.run} is {before.phase}, so there is nothing to save now",
            hint=f"see `perdure status {found.run}`",
        )
    ready = _until(found, lambda now: now.can_save or now.phase == "finished", DUE_S)
    if ready is None:
        raise RunProblem(
            f"the script of {found.run} has not asked run.due(step) for {span(DUE_S)}, so it "
            "cannot be told to save",
            hint="call run.due(step) in its loop (see the README); a script without it saves by "
            "its own rules",
        )
    if ready.phase == "finished":
        raise RunProblem(
            f"run {found.run} ended before it could save", hint=f"see `perdure why {found.run}`"
        )
    client = must_connect(found, "save")
    try:
        client.save(by="perdure save")
    finally:
        client.close()
    last = -1 if before.checkpoint_step is None else before.checkpoint_step
    wanted = max(last + 1, before.step)
    view = _until(
        found,
        lambda now: (
            now.phase == "finished"
            or (now.checkpoint_step is not None and now.checkpoint_step >= wanted)
        ),
        SAVE_S,
    )
    if view is None or view.checkpoint_step is None or view.checkpoint_step < wanted:
        raise RunProblem(
            f"no checkpoint of step {wanted:,} or later was committed"
            + (" before the run ended" if view is not None else f" within {span(SAVE_S)}"),
            hint=f"see `perdure events {found.run}` for what came between",
        )
    _report(given, view, f"checkpoint of step {view.checkpoint_step:,} is committed")
    return 0


def _until(found: Found, done: Callable[[RunView], bool], limit_s: float) -> RunView | None:
    """The first status that satisfies `done`, showing each change of phase; None after `limit_s`."""
    until, told = time.monotonic() + limit_s, ""
    for status, _ in turns(found):
        view = RunView.read(status)
        if done(view):
            return view
        reason = "" if view.phase == "running" else view.because
        words = f"{view.phase}: {reason}" if reason else view.phase
        if words != told:
            told = words
            print(f"perdure: {words}", file=sys.stderr, flush=True)
        if time.monotonic() > until or view.phase == "finished":
            break
    return None


def _report(given: Given, view: RunView, text: str) -> None:
    if given.flag("json"):
        facts = {"run": view.run, "phase": view.phase, "step": view.step}
        print(json.dumps({**facts, "checkpoint": view.checkpoint_step}))
    else:
        print(text)
