"""The loop around the core: poll the world, step, journal, perform. It decides nothing.

A turn gathers first and decides then: links, cluster, store thread and signals leave what happened in
one batch of events; the core answers each with commands; events, commands and reasons go to the
journal; the commands are performed. Nothing is done inside a callback, nothing raises into the loop
(a failure is an event), and nothing here waits for a store or a peer: the loop sleeps on descriptors
until the next deadline, so that a rank's death is answered in the time the messages take.

The beginning is a turn like any other: the history of checkpoints is read by the store's thread
while agents are dialled, and the first event (Started, or TookOver) goes in when both are there.
A controller that finds a later term in the store, or is refused by an agent for one, stops acting.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from perdure.checkpoint.store import Store
from perdure.runtime.beginning import Beginning
from perdure.runtime.clock import Clock
from perdure.runtime.cluster import Cluster
from perdure.runtime.control import Asks, ControlServer
from perdure.runtime.core import codec
from perdure.runtime.core.core import Core
from perdure.runtime.core.events import (
    BeatsSeen,
    Event,
    NodesOffered,
    SaveAsked,
    StopAsked,
    Tick,
)
from perdure.runtime.errors import RunProblem
from perdure.runtime.fleet import Agent, Fleet
from perdure.runtime.heard import event_of
from perdure.runtime.journal import Journal, Line, over
from perdure.runtime.opening import Opening
from perdure.runtime.people import status_json
from perdure.runtime.performer import Performer
from perdure.runtime.spec import JobSpec
from perdure.runtime.storework import StoreWorker
from perdure.runtime.watch import Watch
from perdure.runtime.wire import Listener, Message

Observer = Callable[[dict[str, Any], list[Line]], None]

POLL_S = 0.25  # the cluster is looked at this often ...
POLL_SOON_S = 0.02  # ... and this often while nodes are missing, for the first while
SOON_FOR_S = 5.0
SHOW_S = 0.25  # observers see the status at most this often when nothing happened
REREAD_S = 5.0
JOURNAL_END_S = 10.0  # the last segment is waited for so long
UPLOADS_END_S = 75.0  # agents finish what is staged; the cluster ends who is left


class Driver:
    """One controller's life. `run()` returns the job's exit code, or raises what stopped it."""

    def __init__(
        self,
        spec: JobSpec,
        *,
        cluster: Cluster,
        store: Store,
        token: str,
        opening: Opening,
        secrets: dict[str, str],
        store_env: dict[str, str] | None = None,
        host: str = "127.0.0.1",
        observer: Observer | None = None,
    ) -> None:
        self.spec = spec
        self._cluster, self._store, self._term = cluster, store, opening.term
        self._opening, self._secrets, self._store_env = opening, secrets, store_env or {}
        self._observer = observer
        self._clock = Clock()
        self._core = Core(spec, opening.state)
        self._watch = Watch()
        self._worker = StoreWorker()
        self._watch.add(self._worker, self._worker.drain)
        self._journal = Journal(store, opening.term, self._worker, self._head)
        self._events: list[Event] = []
        self._lines: list[Line] = []
        self._asked: list[Event] = []  # by signal handlers and other threads
        self._fleet, self._performer, self._beginning = self._parts()
        listener = Listener(token, host=host)
        self.address = (host, listener.port)
        self._control = ControlServer(listener, self._watch, self._asks())
        self._opened = False
        self._waiting_for = ""
        self._offered: tuple[object, ...] | None = None
        self._logs: dict[int, str] = {}
        self._begun_s = self._turned_s = time.monotonic()
        self._poll_at_s = self._show_at_s = 0.0

    def _parts(self) -> tuple[Fleet, Performer, Beginning]:
        fleet = Fleet(
            run=self.spec.run,
            term=self._term,
            watch=self._watch,
            stamp_s=self._clock.stamp_s,
            emit=self._events.append,
            say=self._say,
            on_message=self._heard,
            job=self._job,
        )
        performer = Performer(
            self.spec,
            fleet=fleet,
            cluster=self._cluster,
            store=self._store,
            worker=self._worker,
            stamp_s=self._clock.stamp_s,
            emit=self._events.append,
            say=self._say,
        )
        beginning = Beginning(
            self._opening,
            store=self._store,
            worker=self._worker,
            fleet=fleet,
            performer=performer,
            patience_s=self.spec.timers.takeover_s,
            say=self._say,
        )
        return fleet, performer, beginning

    # What others may ask; safe in any thread and in a signal handler.

    def ask_stop(self, by: str, exit_code: int, at_once: bool = False) -> None:
        at_s = self._clock.now_s()
        self._asked.append(StopAsked(at_s=at_s, by=by, exit_code=exit_code, at_once=at_once))
        self._worker.wake()

    def ask_save(self, by: str) -> None:
        self._asked.append(SaveAsked(at_s=self._clock.now_s(), by=by))
        self._worker.wake()

    def status(self) -> dict[str, Any]:
        return status_json(
            self.spec,
            self._core.status(),
            self._performer.beats,
            waiting_for=self._waiting_for,
            logs=self._logs,
            journal_problem=self._journal.problem,
        )

    def run(self) -> int:
        """Raises RunProblem or StoreProblem when the job cannot begin or belongs to another."""
        try:
            for problem in self._opening.problems:
                self._say("", f"a part of the journal was left aside: {problem}")
            self._beginning.read()
            self._ask_for_nodes()
            while self._performer.finished is None:
                self._turn()
                if (failure := self._beginning.failure) is not None:
                    self._leave(str(failure))
                    raise failure
                if self._journal.superseded or self._fleet.superseded_by is not None:
                    self._leave("another controller has taken this run over", wait=False)
                    raise RunProblem(
                        "another controller has taken this run over",
                        hint="`perdure status` asks the one that holds it now",
                    )
            return self._wind_down()
        finally:
            self._fleet.close()
            self._control.close()
            self._worker.close(1.0)
            self._watch.close()

    def _turn(self) -> None:
        self._watch.wait(self._sleep_s())
        now = time.monotonic()
        pause_s = now - self._turned_s - 2 * self.spec.timers.beat_s
        if pause_s > 0:
            self._fleet.excuse(pause_s)
        self._turned_s = now
        now_s = self._clock.now_s()
        self._control.sweep(now)
        self._fleet.dial(now_s)
        if now >= self._poll_at_s:
            self._poll(now, now_s)
        if not self._opened and (first := self._beginning.first_event(self._clock.stamp_s)):
            self._events.insert(0, first)
            self._opened = True
        if self._opened:
            self._gather(now_s)
            self._decide()
        self._show(now)
        self._journal.turn(self._clock.now_s())

    def _sleep_s(self) -> float:
        if self._events or self._asked:
            return 0.0
        now, now_s = time.monotonic(), self._clock.now_s()
        wall = [self._fleet.deadline_s(), self._journal.deadline_s()]
        if self._opened:
            wall.append(self._core.deadline_s())
        sleeps = [self._poll_at_s - now, self.spec.timers.beat_s]
        sleeps += [at_s - now_s for at_s in wall if at_s is not None]
        return max(0.0, min(sleeps))

    def _poll(self, now: float, now_s: float) -> None:
        view = self._cluster.poll()
        self._fleet.meet(view, now_s)
        words = [view.waiting_for, *self._fleet.unfit()]
        if missing := sorted(set(self.spec.secret_env) - self._secrets.keys()):
            words.append(f"the values of {', '.join(missing)}: give them with `perdure resume`")
        self._waiting_for = "; ".join(word for word in words if word)
        short = len(self._fleet.offers()) < max(1, self._performer.wanted)
        soon = short and now - self._begun_s < SOON_FOR_S
        self._poll_at_s = now + (POLL_SOON_S if soon else POLL_S)

    # The beginning.

    def _ask_for_nodes(self) -> None:
        """Before the core can: agents start, or are found, while the store is being read."""
        state = self._opening.state
        excluded = frozenset(state.excluded if state is not None else ())
        self._performer.wanted = self.spec.nnodes + self.spec.spares
        self._cluster.request(self._performer.wanted, excluded)

    # A turn.

    def _gather(self, now_s: float) -> None:
        timers = self.spec.timers
        late = self._fleet.late(now_s, 2 * timers.beat_s)
        beats = self._performer.beats
        if beats is not None and (beats.fresh or late):
            beats.fresh = False
            seen = BeatsSeen(
                at_s=self._clock.stamp_s(),
                attempt=beats.attempt,
                step=beats.step,
                steps_per_s=beats.steps_per_s,
                late=late,
                can_save=beats.can_save,
            )
            self._events.append(seen)
        for node, silent_s in late:
            if silent_s >= timers.takeover_s:
                self._fleet.give_up(node, now_s)
        offers = self._fleet.offers()
        if self._offered != (offers, self._waiting_for):
            self._offered = (offers, self._waiting_for)
            at_s = self._clock.stamp_s()
            self._events.append(
                NodesOffered(at_s=at_s, nodes=offers, waiting_for=self._waiting_for)
            )
        self._events += self._asked
        self._asked.clear()

    def _decide(self) -> None:
        batch, self._events[:] = list(self._events), []
        deadline_s = self._core.deadline_s()
        if deadline_s is not None and deadline_s <= self._clock.now_s():
            batch.append(Tick(at_s=self._clock.stamp_s()))
        for event in batch:
            commands = self._core.step(event)
            # Healthy beats and idle ticks are not news: a journal of them would bury the story.
            if commands or not isinstance(event, BeatsSeen | Tick):
                self._note(codec.to_json(event))
            for command in commands:
                self._note({**codec.to_json(command), "at": self._clock.stamp_s()})
                self._performer.perform(command)

    def _note(self, line: Line) -> None:
        self._lines.append(line)
        self._journal.append(line)

    def _say(self, node: str, text: str) -> None:
        self._note({"kind": "note", "at": self._clock.stamp_s(), "node": node, "text": text})

    def _show(self, now: float) -> None:
        if not self._lines and now < self._show_at_s:
            return
        if self._observer is None and not self._control.watched and not self._lines:
            return
        lines, self._lines = self._lines, []
        status = self.status()
        self._show_at_s = now + SHOW_S
        self._control.publish(status, lines)
        if self._observer is not None:
            self._observer(status, lines)

    def _head(self) -> list[Line]:
        at_s = self._clock.stamp_s()
        lines: list[Line] = []
        if self._opened:
            lines.append({"kind": "state", "at": at_s, "core": self._core.state.to_json()})
        else:
            lines += self._opening.lines(at_s)
        lines.append({"kind": "alive", "at": at_s, "term": self._term, "status": self.status()})
        finish = self._performer.finished
        if finish is not None:
            lines.append(over(at_s, finish.exit_code, finish.because))
        return lines

    # What agents say.

    def _heard(self, agent: Agent, message: Message) -> None:
        node, kind = agent.endpoint.node, message["kind"]
        try:
            if kind == "beat":
                beats = self._performer.beats
                if beats is not None and message.get("attempt") == str(beats.attempt):
                    beats.take(message["ranks"], self._clock.now_s())
            elif kind == "save_set":
                self._performer.save_set(message)
            elif kind == "note":
                self._say(node, str(message["text"]))
            else:
                if kind == "started":
                    self._logs.update({int(r): p for r, p in message.get("logs", {}).items()})
                    if cold := message.get("cold"):
                        self._say(node, f"ranks were started cold: {cold}")
                self._events.append(event_of(node, message, self._clock.stamp_s()))
        except (KeyError, TypeError, ValueError) as error:
            self._say(node, f"sent a {kind!r} that does not fit: {error}")

    def _job(self, welcome: Message) -> Message | None:
        """The job for an agent; None while a secret's value is not known."""
        names = set(self.spec.secret_env)
        for name, value in (welcome.get("secrets") or {}).items():
            if name in names:
                self._secrets.setdefault(name, value)
        if names - self._secrets.keys():
            return None
        sha = self.spec.code_sha256
        return {
            "kind": "job",
            "spec": asdict(self.spec),
            "spec_sha": hashlib.sha256(self.spec.to_json().encode()).hexdigest(),
            "secrets": {name: self._secrets[name] for name in sorted(names)},
            "code": f"code/{sha}.tar.zst" if sha is not None else None,
            "store_env": self._store_env,
        }

    def _asks(self) -> Asks:
        def secrets(values: dict[str, str]) -> None:
            self._secrets.update({k: v for k, v in values.items() if k in self.spec.secret_env})
            for agent in list(self._fleet.agents.values()):
                if not agent.ready:
                    self._fleet.offer_job(agent)

        return Asks(
            status=self.status,
            stop=self.ask_stop,
            save=self.ask_save,
            secrets=secrets,
        )

    # The end.

    def _wind_down(self) -> int:
        """The end is written first: a controller that dies from here on is not followed by another."""
        finish = self._performer.finished
        assert finish is not None
        self._until(lambda: self._journal.clean, JOURNAL_END_S, at_once=True)
        self._leave(finish.because)
        self._cluster.close()
        self._until(lambda: self._journal.clean, JOURNAL_END_S, at_once=True)
        self._lines.append({"kind": "ended", "at": self._clock.now_s()})
        self._show_at_s = 0.0
        self._show(time.monotonic())
        self._until(self._control.flushed, 1.0)
        return finish.exit_code

    def _leave(self, because: str, *, wait: bool = True) -> None:
        """Let agents end. Those that obey a later term refuse, and stay with its controller."""
        self._fleet.part({"kind": "shutdown", "because": because})
        self._until(self._fleet.flushed, 1.0)
        if wait:
            self._until(self._fleet.parted, UPLOADS_END_S)

    def _until(self, done: Callable[[], bool], bound_s: float, *, at_once: bool = False) -> None:
        """Turns without decisions: late words are journaled, not acted upon."""
        end = time.monotonic() + bound_s
        self._journal.turn(self._clock.now_s(), at_once=at_once)
        while not done() and time.monotonic() < end:
            self._watch.wait(min(0.25, end - time.monotonic()))
            for event in self._events:
                if self._opened:
                    self._core.step(event)
                self._note(codec.to_json(event))
            self._events.clear()
            self._show(time.monotonic())
            more = at_once and not self._journal.clean
            self._journal.turn(self._clock.now_s(), at_once=more)
