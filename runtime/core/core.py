"""The one door: `Core.step(event) -> commands` is the only way in which anything is decided.

The core reads no clock and no random number: time comes in with the events, so a journal replays to
the same decisions and the simulator runs this very code. It is total: any event in any state gives an
answer (mostly "nothing"), and raises only InvariantBroken, when going on would break its own law,
which is written in `table.py`. Deadlines are looked at on a Tick alone: the driver sends one when
`deadline_s()` has passed, after the other news of that turn, so that an answer which came in time is
never overtaken by its own deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from perdure.runtime import causes
from perdure.runtime.core import events, invariants, policy
from perdure.runtime.core.commands import Command, MarkBad, SaveNow
from perdure.runtime.core.events import Event, RestorePoint
from perdure.runtime.core.moves import LIVE, Moves
from perdure.runtime.core.state import Blame, CoreState, Status, StopWish
from perdure.runtime.core.takeover import take_over
from perdure.runtime.spec import JobSpec


class Core(Moves):
    """Decides for one job. `state`: a snapshot to go on from; a new run has none."""

    def __init__(self, spec: JobSpec, state: CoreState | None = None) -> None:
        super().__init__(spec, state if state is not None else CoreState())
        self._handlers = cast(
            "dict[type, Callable[[Event], None]]",
            {
                events.Started: self._started,
                events.TookOver: lambda event: take_over(self, event),
                events.NodesOffered: self._nodes_offered,
                events.GangStarted: self._gang_started,
                events.BeatsSeen: self._beats_seen,
                events.RankExited: self._rank_exited,
                events.NodeLost: self._node_lost,
                events.GangStopped: self._gang_stopped,
                events.CheckpointCommitted: self._committed,
                events.RestoreFailed: self._restore_failed,
                events.SaveAsked: self._save_asked,
                events.StopAsked: self._stop_asked,
                events.CommandFailed: self._command_failed,
                events.Tick: self._tick,
            },
        )

    def step(self, event: Event) -> tuple[Command, ...]:
        """The commands that follow from `event`, in the order to perform them."""
        s = self.state
        s.now_s = max(s.now_s, event.at_s)
        if s.phase == "finished" and type(event) is not events.TookOver:
            return ()
        self._handlers[type(event)](event)
        if not self.out:
            return ()
        invariants.check(self.spec, s, self.out)
        commands, self.out = tuple(self.out), []
        return commands

    def deadline_s(self) -> float | None:
        """When a Tick could next change anything; None: never, by itself."""
        s = self.state
        if s.phase == "finished":
            return None
        times = [by for by, _ in s.cleaning.values()]
        times += s.excluded.values()
        if s.phase == "waiting":
            times.append(s.place_by_s)
            if self.held_until_s() > s.now_s:
                times.append(self.held_until_s())
        elif s.phase == "launching":
            times.append(s.start_by_s)
        elif s.phase == "saving":
            times.append(s.save_by_s)
        elif s.phase == "stopping":
            times.append(s.stop_by_s)
        return min(times, default=None)

    def status(self) -> Status:
        s = self.state
        members = {m.node for m in s.members}
        words, held_s = s.waiting_for, self.held_until_s() - s.now_s
        if held_s > 0:
            words = f"up to {held_s:.0f} s for what may still train to end"
        return Status(
            phase=s.phase,
            because=s.because,
            waiting_for=words if s.phase == "waiting" else "",
            attempt=s.attempt,
            step=s.step,
            steps_per_s=s.steps_per_s if s.phase in LIVE else 0.0,
            restore=s.restore,
            commit=s.line[0] if s.line else None,
            committed_at_s=s.committed_at_s,
            members=s.members,
            spares=tuple(sorted(n for n in self.usable() if n not in members)),
            faults=tuple(s.faults),
            restarts=s.restarts_total,
            root_cause=s.root,
            stop_asked_by=s.stop.by if s.stop is not None else "",
            exit_code=s.exit_code,
        )

    def _started(self, event: events.Started) -> None:
        s = self.state
        if s.phase != "new":
            return
        s.term, s.counter = event.term, event.counter
        s.line = list(event.line)
        s.had_commit = bool(s.line)
        s.furthest = s.line[0].step if s.line else 0
        self.wait(event.by if not s.line else f"{event.by}, from step {s.line[0].step}")
        self.request(event.by)

    def _nodes_offered(self, event: events.NodesOffered) -> None:
        self.state.offered = dict(event.nodes)
        self.state.waiting_for = event.waiting_for
        self.tend()

    def _gang_started(self, event: events.GangStarted) -> None:
        s = self.state
        if event.attempt != s.attempt or s.phase != "launching":
            return
        s.started.add(event.node)
        if len(s.started) >= len(s.members) and s.started >= {m.node for m in s.members}:
            self.move("running", s.because)
            if s.stop is not None:  # asked while the controller changed
                self.ask_stop(s.stop, at_once=False)
            self._save_if_wanted()

    def _beats_seen(self, event: events.BeatsSeen) -> None:
        s = self.state
        if event.attempt == s.attempt and s.phase in LIVE:
            if s.first_step is None and event.step > 0:
                s.first_step = event.step
            s.step = event.step if s.first_step is not None else s.step
            s.steps_per_s = event.steps_per_s
            s.can_save = event.can_save
            if s.save_wanted:
                self._save_if_wanted()
        for node, silent_s in event.late:
            if silent_s >= self.spec.timers.takeover_s and node not in s.away:
                why = f"silent for {silent_s:.1f} s"
                if any(m.node == node for m in s.members):
                    s.silent[node] = s.now_s - silent_s
                self._lose_if_known(node, "node_silent", why, exclude=True)
        if event.late:
            self.tend()  # after all of them: none may be chosen for the place of another

    def _rank_exited(self, event: events.RankExited) -> None:
        s = self.state
        report = event.report
        if event.attempt != s.attempt or report.rank in s.exits:
            return
        if s.phase in LIVE or s.phase == "stopping":
            s.exits[report.rank] = report
        if s.phase not in LIVE:
            return
        if report.exit_code == 0 and not report.by_us:
            if len(s.exits) == self.spec.world_size:
                self.finish(0, "every rank ended with 0")
            return
        self.stop(causes.cause_of_exit(report).fault.because)

    def _node_lost(self, event: events.NodeLost) -> None:
        self._lose_if_known(event.node, "node_lost", event.why)
        self.tend()

    def _lose_if_known(self, node: str, kind: str, why: str, *, exclude: bool = False) -> None:
        s = self.state
        if node in s.away:
            # Its loss is known; that it is not merely silent may be new.
            s.offered.pop(node, None)
            s.silent.pop(node, None)
        elif node in s.offered or node in s.stopping or any(m.node == node for m in s.members):
            blame: Blame = "network" if kind == "node_silent" else "node"
            self.lose(node, kind, blame, why, exclude=exclude)

    def _gang_stopped(self, event: events.GangStopped) -> None:
        s = self.state
        if event.node in s.stopping and event.attempt == s.attempt:
            s.stopping.remove(event.node)
            if not s.stopping:
                self.stopped()
                self.tend()
        elif event.node in s.cleaning and event.attempt >= s.cleaning[event.node][1]:
            del s.cleaning[event.node]
            s.silent.pop(event.node, None)
            self.tend()

    def _committed(self, event: events.CheckpointCommitted) -> None:
        s = self.state
        point = RestorePoint(event.step, event.attempt)
        if event.tier != "store" or not policy.keeps_on_line(s, point):
            return
        s.line.append(point)
        s.line.sort(key=lambda p: (p.step, p.attempt), reverse=True)
        s.had_commit = True
        s.committed_at_s = s.now_s
        saved = event.attempt == s.attempt and event.step >= s.save_from
        if s.phase == "saving" and saved:
            self.stop(f"saved step {event.step}; stopping", self.spec.timers.stop_grace_s)

    def _restore_failed(self, event: events.RestoreFailed) -> None:
        s = self.state
        if event.attempt != s.attempt or event.point != s.restore or event.point in s.bad:
            return
        s.bad.append(event.point)
        s.line = [p for p in s.line if p != event.point]
        because = f"step {event.point.step} could not be restored: {event.why}"
        self.out.append(MarkBad(point=event.point, because=because))
        self.blame("restore_failed", "storage", because, causes.RESTORE, None, event.rank)
        if s.phase in LIVE:
            self.stop(because)

    def _save_asked(self, event: events.SaveAsked) -> None:
        self.state.save_wanted = event.by
        self._save_if_wanted()

    def _save_if_wanted(self) -> None:
        s = self.state
        if s.save_wanted and s.can_save and s.phase == "running" and s.attempt is not None:
            self.out.append(SaveNow(attempt=s.attempt, because=f"{s.save_wanted} asked for it"))
            s.save_wanted = ""

    def _stop_asked(self, event: events.StopAsked) -> None:
        self.ask_stop(StopWish(by=event.by, exit_code=event.exit_code), at_once=event.at_once)

    def _command_failed(self, event: events.CommandFailed) -> None:
        s = self.state
        if event.attempt is not None and event.attempt != s.attempt:
            return
        if event.command == "launch_gang" and s.phase in ("launching", "running"):
            because = f"the ranks could not be started: {event.why}"
            if event.node is not None:
                s.losses[event.node] = s.losses.get(event.node, 0) + 1
            self.blame("launch_failed", "unknown", because, causes.START, event.node, None)
            self.stop(because)
        elif event.command == "stop_gang" and event.node is not None:
            if event.node in s.stopping or event.node in s.cleaning:
                self.deaf([event.node], "stop_unanswered", event.why)
        elif event.command == "save_now" and s.phase == "saving":
            self.stop(f"the save failed: {event.why}", self.spec.timers.stop_grace_s)
        elif event.command == "request_nodes":
            s.waiting_for = event.why

    def _tick(self, event: events.Tick) -> None:
        s = self.state
        lapsed = [n for n, until in s.excluded.items() if until <= s.now_s]
        if lapsed:
            s.excluded = {n: until for n, until in s.excluded.items() if until > s.now_s}
            self.request(f"{', '.join(sorted(lapsed))} may be used again")
        deaf = sorted(n for n, (by, _) in s.cleaning.items() if by <= s.now_s)
        if deaf:
            self.deaf(deaf, "stop_unanswered", "it came back and did not answer a stop")
        if s.phase == "launching" and s.now_s >= s.start_by_s:
            late = sorted(m.node for m in s.members if m.node not in s.started)
            self.deaf(late, "start_unanswered", "its ranks did not start in time")
        elif s.phase == "saving" and s.now_s >= s.save_by_s:
            self.stop("the save did not come in time; stopping", self.spec.timers.stop_grace_s)
        elif s.phase == "stopping" and s.now_s >= s.stop_by_s:
            self.deaf(sorted(s.stopping), "stop_unanswered", "it did not answer a stop")
        self.tend()
        if s.phase == "waiting" and s.now_s >= s.place_by_s:
            short = f"{len(self.usable())} of {self.spec.nnodes} nodes"
            words = s.waiting_for or short
            place_s = self.spec.timers.place_s
            self.finish(75, f"nothing to place the job on within {place_s:g} s: {words}")
