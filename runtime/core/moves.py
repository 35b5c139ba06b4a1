"""What the core can do: each move changes the state and says the commands that make it true.

`core.py` and `takeover.py` say when; nothing is decided here beyond what a move needs. A move may be
made in any phase that TABLE allows it from. Commands are appended in the order to perform them:
what stops comes before what starts.
"""

from __future__ import annotations

from perdure.runtime import causes
from perdure.runtime.core import commands, invariants, policy
from perdure.runtime.core.events import Attempt, Member
from perdure.runtime.core.state import Blame, CoreState, Fault, Phase, StopWish
from perdure.runtime.core.table import EXCLUDE_S, TABLE
from perdure.runtime.errors import InvariantBroken
from perdure.runtime.spec import JobSpec

LIVE: frozenset[Phase] = frozenset({"launching", "running", "saving"})  # ranks may step


class Moves:
    def __init__(self, spec: JobSpec, state: CoreState) -> None:
        self.spec = spec
        self.state = state
        self.out: list[commands.Command] = []
        # Later than takeover_s, so that a member that fell silent is judged as silent, not as deaf.
        self.answer_s = spec.timers.takeover_s + spec.timers.beat_s

    def move(self, phase: Phase, because: str) -> None:
        if phase not in TABLE[self.state.phase]:
            raise InvariantBroken(
                f"the core went from {self.state.phase} to {phase}: {because}",
                hint="report this with the run's journal; `perdure resume` goes on from it",
            )
        self.state.phase = phase
        self.state.because = because

    def request(self, because: str) -> None:
        count = self.spec.nnodes + self.spec.spares
        exclude = tuple(sorted(self.state.excluded))
        self._forget_requests()
        self.out.append(commands.RequestNodes(count=count, exclude=exclude, because=because))

    def _forget_requests(self) -> None:
        """One request a step: the last says it all."""
        self.out = [c for c in self.out if not isinstance(c, commands.RequestNodes)]

    def wait(self, because: str) -> None:
        self.move("waiting", because)
        self.state.place_by_s = self.state.now_s + self.spec.timers.place_s

    def usable(self) -> list[str]:
        s = self.state
        slots = self.spec.nproc_per_node
        barred = s.away | s.excluded.keys() | s.cleaning.keys() | s.stopping
        return [n for n, held in s.offered.items() if held >= slots and n not in barred]

    def tend(self) -> None:
        """Clean nodes that came back; launch if the job waits and can go."""
        s = self.state
        if s.phase == "finished":
            return
        if s.attempt is not None and s.away:
            back = sorted(n for n in s.away if n in s.offered and n not in s.excluded)
            if back:
                s.away.difference_update(back)
                # All up to now in this term: an earlier controller may have launched what we never knew.
                upto = Attempt(s.term, s.counter)
                for node in back:
                    s.cleaning[node] = (s.now_s + self.answer_s, upto)
                why = "these nodes were lost and came back: nothing old may run on them"
                self._say_stop(upto, tuple(back), 0.0, why)
        if s.phase == "waiting" and s.had_commit and not s.line:
            why = (
                f"no checkpoint that is known here can be restored any more; the last: {s.because}."
            )
            hint = "`perdure resume` looks for others; to start from nothing, use another --store"
            self.finish(2, f"{why} {hint}")
        elif s.phase == "waiting" and s.now_s >= self.held_until_s():
            members = policy.choose_gang(self.spec, s, self.usable())
            if members:
                self.launch(members)

    def held_until_s(self) -> float:
        """No launch before: somebody given up may hold a lease, or the whole gang its own majority."""
        s = self.state
        until = s.hold_until_s
        if len(s.silent) >= len(s.members) > 1:
            until = max(until, max(s.silent.values()) + self.spec.timers.orphan_grace_s)
        return until

    def launch(self, members: tuple[Member, ...]) -> None:
        s = self.state
        before = {m.node for m in s.members}
        came = sorted(m.node for m in members if m.node not in before)
        because = s.because
        if before and came:
            gone = sorted(before - {m.node for m in members})
            because += f"; {', '.join(came)} in place of {', '.join(gone)}"
        invariants.check_restore(s)
        s.counter += 1
        s.attempt = Attempt(s.term, s.counter)
        s.members = members
        s.restore = s.line[0] if s.line else None
        s.started, s.exits, s.causes, s.silent = set(), {}, [], {}
        s.first_step, s.steps_per_s, s.can_save = None, 0.0, False
        s.step = s.restore.step if s.restore is not None else 0
        s.start_by_s = s.now_s + self.spec.timers.start_s
        s.waiting_for = ""
        self.move("launching", because)
        self.out.append(
            commands.LaunchGang(
                attempt=s.attempt, members=members, restore=s.restore, because=because
            )
        )

    def blame(
        self, kind: str, blame: Blame, because: str, weight: int, node: str | None, rank: int | None
    ) -> None:
        """Write down what may have ended the newest attempt."""
        now_s = self.state.now_s
        fault = Fault(at_s=now_s, kind=kind, blame=blame, rank=rank, node=node, because=because)
        self.state.causes.append(causes.cause_of_fault(fault, weight))

    def stop(self, because: str, grace_s: float = 0.0) -> None:
        """End the gang on every member that can still answer."""
        s = self.state
        assert s.attempt is not None
        nodes = tuple(m.node for m in s.members if m.node not in s.away)
        s.stopping = set(nodes)
        s.stop_by_s = s.now_s + grace_s + self.answer_s
        if s.phase != "stopping":
            self.move("stopping", because)
        if nodes:
            self._say_stop(s.attempt, nodes, grace_s, because)
        else:
            self.stopped()

    def _say_stop(
        self, attempt: Attempt, nodes: tuple[str, ...], grace_s: float, because: str
    ) -> None:
        self.out.append(
            commands.StopGang(attempt=attempt, nodes=nodes, grace_s=grace_s, because=because)
        )

    def stopped(self) -> None:
        """No process of the attempt is left anywhere: judge, then end the job or go on."""
        s = self.state
        if s.stop is not None:
            self.finish(s.stop.exit_code, f"stopped: {s.stop.by} asked for it")
            return
        cause = policy.judge(s.causes, s.exits, s.now_s)
        s.note(cause.fault)
        report = s.exits.get(cause.fault.rank) if cause.fault.rank is not None else None
        s.root = report if cause.fault.kind in ("rank_exit", "rank_signal") else None
        if policy.is_barren(self.spec, s, cause):
            s.barren.append(cause.signature)
        elif cause.signature:
            s.barren.clear()
        s.furthest = max(s.furthest, policy.reached(s))
        since = s.now_s - self.spec.budget.window_s
        s.restarts = [at for at in s.restarts if at > since]
        end = policy.give_up(self.spec, s, cause)
        if end is not None:
            self.finish(*end)
            return
        s.restarts.append(s.now_s)
        s.restarts_total += 1
        s.script_restarts += policy.is_capped(cause)
        self.wait(cause.fault.because)

    def lose(self, node: str, kind: str, blame: Blame, why: str, *, exclude: bool = False) -> None:
        """The node is given up: as a member, as a spare, or as one that came back."""
        s = self.state
        member = any(m.node == node for m in s.members)
        s.offered.pop(node, None)
        s.cleaning.pop(node, None)
        s.losses[node] = s.losses.get(node, 0) + 1
        if s.attempt is not None:
            s.away.add(node)
        if exclude:
            s.excluded[node] = s.now_s + EXCLUDE_S
        because = f"node {node} is lost: {why}"
        if member and s.phase in LIVE:
            self.blame(kind, blame, because, causes.OUTSIDE, node, None)
            self.stop(because)
        elif node in s.stopping:
            # What did not answer a stop was not what made us stop.
            if kind != "stop_unanswered":
                self.blame(kind, blame, because, causes.OUTSIDE, node, None)
            s.stopping.remove(node)
            if not s.stopping:
                self.stopped()
        else:
            at_s = s.now_s
            s.note(Fault(at_s=at_s, kind=kind, blame=blame, rank=None, node=node, because=because))
        if s.phase != "finished":
            self.request(because)

    def deaf(self, nodes: list[str], kind: str, why: str) -> None:
        """Given up though their agents may live: they must fence before anything is launched."""
        self.state.hold_until_s = self.state.now_s + self.spec.timers.takeover_s
        for node in nodes:
            if self.state.phase != "finished":
                self.lose(node, kind, "node", why, exclude=True)

    def ask_stop(self, wish: StopWish, *, at_once: bool) -> None:
        """Begin, or hasten, the end that a person or a scheduler asked for."""
        s = self.state
        hasten = at_once or s.stop is not None
        s.stop = s.stop or wish
        because = f"{s.stop.by} asked to stop"
        grace_s = 0.0 if hasten else self.spec.timers.stop_grace_s
        if s.phase in ("new", "waiting"):
            self.finish(s.stop.exit_code, f"stopped: {s.stop.by} asked for it")
        elif s.phase == "running" and s.can_save and not hasten:
            assert s.attempt is not None
            s.save_by_s, s.save_from = s.now_s + grace_s, s.step
            self.move("saving", f"{because}; saving first")
            self.out.append(commands.SaveNow(attempt=s.attempt, because=f"{because}: save first"))
        elif s.phase in LIVE:
            self.stop(because, grace_s)
        elif s.phase == "stopping" and hasten:
            assert s.attempt is not None
            s.stop_by_s = min(s.stop_by_s, s.now_s + self.answer_s)
            self._say_stop(s.attempt, tuple(sorted(s.stopping)), 0.0, f"{because}, at once")

    def finish(self, exit_code: int, because: str) -> None:
        self.state.exit_code = exit_code
        self.state.stopping = set()
        self._forget_requests()
        self.move("finished", because)
        self.out.append(commands.Finish(exit_code=exit_code, because=because))
