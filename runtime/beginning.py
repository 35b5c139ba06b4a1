"""The first event of a controller, once all that it needs has come in.

The checkpoints' history comes from the store's thread while agents are being dialled. A new core
needs no more than that. One that goes on from a snapshot waits for the agents it knows of as well:
each is asked until it answers, refuses, or was silent for so long that the core may count it as lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from perdure.checkpoint.store import Store
from perdure.runtime.core.events import AgentAnswer, Attempt, Event, Started, TookOver
from perdure.runtime.errors import RunProblem, StoreProblem
from perdure.runtime.fleet import Fleet
from perdure.runtime.opening import Line, Opening, read_line
from perdure.runtime.performer import Performer
from perdure.runtime.storework import StoreWorker


class Beginning:
    def __init__(
        self,
        opening: Opening,
        *,
        store: Store,
        worker: StoreWorker,
        fleet: Fleet,
        performer: Performer,
        patience_s: float,
        say: Callable[[str, str], None],
    ) -> None:
        self._opening, self._store, self._worker = opening, store, worker
        self._fleet, self._performer = fleet, performer
        self._patience_s, self._say = patience_s, say
        self._begun_s = time.monotonic()
        self._line: Line | None = None
        self.failure: Exception | None = None  # the job cannot begin

    def read(self) -> None:
        def then(result: Line | Exception) -> None:
            if not isinstance(result, Exception):
                self._line = result
                for note in result.notes:
                    self._say("", note)
            elif (state := self._opening.state) is None:
                self.failure = result
            elif isinstance(result, RunProblem) and state.had_commit:
                # Nothing to restore is no reason to end ranks that train. The core knows that there
                # was a commit: should they end, it does not start from nothing.
                self._say("", str(result))
                self._line = Line(points=(), counter=state.counter)
            elif not isinstance(result, StoreProblem):
                self.failure = result
            else:  # ranks may be training, and may go on without a store for a while
                self._say("", f"the store cannot be read, trying again: {result}")
                self.read()

        self._worker.submit(lambda: read_line(self._store, self._opening.step), then)

    def first_event(self, stamp_s: Callable[[], float]) -> Event | None:
        line, opening = self._line, self._opening
        if line is None:
            return None
        answers = self._answers() if opening.restarted else ()
        if answers is None:
            return None
        launched = [a for a in answers if a.attempt is not None]
        if opening.state is None and not launched:
            return Started(
                at_s=stamp_s(),
                term=opening.term,
                counter=max(opening.counter, line.counter),
                line=line.points,
                by=opening.by,
            )
        if launched:
            newest = max(launched, key=_by_attempt)
            assert newest.attempt is not None
            nodes = tuple(m.node for m in newest.members)
            self._performer.adopt(newest.attempt, nodes, newest.restore)
        return TookOver(at_s=stamp_s(), term=opening.term, answers=answers, line=line.points)

    def _answers(self) -> tuple[AgentAnswer, ...] | None:
        """None while somebody may still answer."""
        state, answers = self._opening.state, self._fleet.answers()
        if state is not None and state.attempt is not None:
            known = {m.node for m in state.members} | state.cleaning.keys() | state.offered.keys()
            # The snapshot is up to a second old: a gang may hold nodes that it does not know.
            known |= {n for n, agent in self._fleet.agents.items() if agent.welcome is None}
            gone = {node for node, _port in self._fleet.gone}
            missing = len(known - answers.keys() - gone)
        else:  # it died before it wrote of a launch: whatever agents there are may hold a gang
            missing = self._performer.wanted - len(answers)
        if missing > 0 and time.monotonic() - self._begun_s < self._patience_s:
            return None
        return tuple(answers[node] for node in sorted(answers))


def _by_attempt(answer: AgentAnswer) -> tuple[Attempt, str]:
    assert answer.attempt is not None
    return (answer.attempt, answer.node)
