"""How a controller begins: what the run's folder says, before anything is decided.

Three beginnings, told apart by the journal alone: a new run; a run that is resumed after its gang
ended (a new core, the counter going on); a run whose controller died (the core goes on from its
snapshot and meets the agents). A term has been taken before this is read, so nobody else writes on.

Whether another controller still lives is judged by movement: a journal that moves belongs to a
living run. Machines' clocks are not trusted further than SILENT_S for that; the terms do the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perdure.checkpoint import lineage
from perdure.checkpoint.errors import CheckpointError, StateError
from perdure.checkpoint.store import Store
from perdure.runtime import journal
from perdure.runtime.core import codec
from perdure.runtime.core.events import RestorePoint
from perdure.runtime.core.state import CoreState
from perdure.runtime.errors import RunProblem, StoreProblem

SILENT_S = 30.0
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    term: int
    by: str  # "run", "resume", "resume --step 40": shown to people
    counter: int = 0  # the highest that the journal knows
    step: int | None = None  # asked for by a person
    restarted: bool = False  # agents of a controller before us may hold a gang
    state: CoreState | None = None  # of the controller before us, whose agents may live
    problems: tuple[str, ...] = ()  # segments that could not be read

    def lines(self, at_s: float) -> list[dict[str, Any]]:
        """The journal's head until the first decision, so that a controller that dies before it is
        followed by one that begins in the same way."""
        if self.state is not None:
            return [{"kind": "state", "at": at_s, "core": self.state.to_json()}]
        words = {"by": self.by, "counter": self.counter, "step": self.step}
        return [{"kind": "opening", "at": at_s, **words}]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeFrom:
    """What a person says with a resume."""

    step: int | None = None  # None: the newest on the line
    takeover: bool = False  # also from a controller that seems alive
    on_wait: Callable[[str], None] = lambda text: None  # told while its life is being judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    points: tuple[RestorePoint, ...]  # newest first
    counter: int  # the highest with a trace among the checkpoints
    notes: tuple[str, ...] = ()  # records that were left aside, and why


def prepare(store: Store, *, resume: ResumeFrom | None = None, known_dead: bool = False) -> Opening:
    """Become the run's controller: take a term, and read what there is to go on from.

    Without `resume` the journal decides: none, a new run; one that is not finished, a takeover of
    what its agents hold. `known_dead`: the controller before us is seen to be gone.
    Raises RunProblem (alive, or not to be read) and StoreProblem.
    """
    if resume is not None and not resume.takeover:
        refuse_if_alive(store, known_dead=known_dead, on_wait=resume.on_wait)
    by = "run" if resume is None else "resume"
    if resume is not None and resume.step is not None:
        by += f" --step {resume.step}"
    term = journal.take_term(store, by=by, at_s=time.time())
    view = journal.read(store)
    if view.state is None:
        begun = view.opening if resume is None and view.opening is not None else {}
        return Opening(
            term=term,
            by=begun.get("by", by),
            counter=begun.get("counter", 0),
            step=begun.get("step", resume.step if resume is not None else None),
            restarted=resume is None and term > 1,
            problems=view.problems,
        )
    try:
        state = CoreState.from_json(view.state)
    except ValueError as error:
        raise RunProblem(
            f"the journal's snapshot cannot be used: {error}",
            hint="was it written by a newer perdure? Then use that version",
        ) from error
    if resume is None:
        return Opening(term=term, by=by, restarted=True, state=state, problems=view.problems)
    return Opening(
        term=term, by=by, counter=state.counter, step=resume.step, problems=view.problems
    )


def read_line(store: Store, step: int | None) -> Line:
    """Commit what is complete, then the run's checkpoints. Waits for the store.

    Raises RunProblem when there are checkpoints and none of them may be restored, or none of `step`;
    StoreProblem when the store cannot be read.
    """
    notes: list[str] = []
    try:
        lineage.commit_complete(store, note=notes.append)
        history = lineage.read_history(store)
        notes += [f"left aside: {why}" for _key, why in history.unreadable]
        if step is None:
            commits = lineage.restorable(history)
        else:
            commits = lineage.line(history)
            chosen = lineage.commit_at(history, step)
            onward = [c for c in commits if c.step < step] if chosen in commits else []
            commits = [chosen, *onward]
    except StateError as error:
        raise RunProblem(str(error), hint=error.hint) from error
    except CheckpointError as error:
        kind = StoreProblem if step is None else RunProblem
        raise kind(str(error), hint=error.hint) from error
    if history.commits and not commits:
        raise RunProblem(
            f"none of the {len(history.commits)} checkpoints in {store.url} may be restored",
            hint="`perdure events` shows why; name one with --step, or another --store",
        )
    newest = history.newest_attempt
    points = (RestorePoint(c.step, codec.attempt_from_text(c.attempt)) for c in commits)
    counter = codec.attempt_from_text(newest).counter if newest is not None else 0
    return Line(points=tuple(points), counter=counter, notes=tuple(notes))


def refuse_if_alive(
    store: Store,
    *,
    known_dead: bool,
    on_wait: Callable[[str], None],
    now_s: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when the run's controller is dead; raises RunProblem when it is alive.

    `known_dead`: its process is seen to be gone. Else a journal that is fresh is watched until it
    moves (alive) or has not moved for SILENT_S.
    """
    view = journal.read(store)
    if known_dead or view.finished is not None or view.last_at is None:
        return
    age_s = now_s() - view.last_at
    if age_s > SILENT_S:
        return
    end_s = now_s() + min(SILENT_S, SILENT_S - age_s)
    told = False
    while now_s() < end_s:
        if not told:
            on_wait(
                f"the journal is {max(0.0, age_s):.0f} s old: watching whether it still moves, "
                f"for {end_s - now_s():.0f} s"
            )
            told = True
        sleep(_LOOK_S)
        newer = journal.read(store)
        if newer.finished is not None:
            return
        if newer.segments != view.segments:
            raise RunProblem(
                "the run is still alive: its journal moves",
                hint="stop it with `perdure stop`, or take it over with --takeover",
            )
