"""A new controller meets a living run: what the journal said, against what the agents say.

The agents are right. The journal is up to a second old, so an attempt that an agent was told to
launch is newer than one that only the journal knows; the highest of all is the run's. If every member
runs it, nothing is sent to any rank: the gang is adopted. Otherwise the old controller died in the
middle of something, and the shortest way to a known state is to stop what is left and launch the
next attempt: launching the same one again would need the same store and port on the same nodes.
"""

from __future__ import annotations

from perdure.runtime import causes
from perdure.runtime.core.commands import Finish
from perdure.runtime.core.events import AgentAnswer, RestorePoint, TookOver
from perdure.runtime.core.moves import Moves


def take_over(core: Moves, event: TookOver) -> None:
    s = core.state
    if s.phase == "finished":
        assert s.exit_code is not None
        core.out.append(Finish(exit_code=s.exit_code, because=s.because))
        return
    answers = {a.node: a for a in event.answers}
    s.term = max(s.term, event.term)
    launched = [a for a in event.answers if a.attempt is not None]
    newest = max(launched, key=lambda a: (a.attempt, a.node), default=None)
    newer = newest is not None and _learn_attempt(core, newest)
    _learn_line(core, event.line)
    over = s.phase == "waiting" and not newer  # its gang was given up before the controller changed
    _learn_nodes(core, answers, over)
    if s.attempt is None:
        if s.phase == "new":
            core.wait("a new controller found no gang")
        s.place_by_s = s.now_s + core.spec.timers.place_s
        core.request("a new controller has taken over")
    elif over:
        core.request("a new controller has taken over")
    else:
        _settle(core, answers)
    core.tend()


def _learn_attempt(core: Moves, newest: AgentAnswer) -> bool:
    """Whether the agents know a later attempt than the journal: then all of the older is void."""
    s = core.state
    assert newest.attempt is not None
    if s.attempt is not None and newest.attempt <= s.attempt:
        return False
    if s.attempt is not None:  # launched by the old controller after the last that it wrote down
        unseen = max(0, newest.attempt.counter - s.counter)
        s.restarts = (s.restarts + [s.now_s] * unseen)[-core.spec.budget.restarts :]
        s.restarts_total += unseen
    s.attempt = newest.attempt
    s.counter = max(s.counter, newest.attempt.counter)
    s.members = newest.members
    s.restore = newest.restore
    s.exits, s.causes, s.stopping, s.silent = {}, [], set(), {}
    s.first_step, s.can_save = None, False
    s.step = newest.step
    if s.phase in ("launching", "saving"):
        s.phase = "running"  # that was the older attempt's; the newer one's is found out below
    return True


def _learn_line(core: Moves, line: tuple[RestorePoint, ...]) -> None:
    """The store's line, as the newest attempt sees it: its record may not be written yet."""
    s = core.state
    s.had_commit = s.had_commit or bool(line) or s.restore is not None
    if s.restore is not None and s.restore not in line and s.restore not in s.bad:
        s.bad.append(s.restore)  # the old controller marked it, after its last words
    kept = [p for p in line if p not in s.bad]
    if s.attempt is not None:
        restore = s.restore
        kept = [
            p
            for p in kept
            if p.attempt == s.attempt
            or (restore is not None and (p.step, p.attempt) <= (restore.step, restore.attempt))
        ]
    s.line = kept


def _learn_nodes(core: Moves, answers: dict[str, AgentAnswer], over: bool) -> None:
    """Who does not answer is lost; who answers with an attempt that is not its own any more is unclean."""
    s = core.state
    members = {m.node for m in s.members}
    known = members | s.offered.keys() | s.cleaning.keys() | s.stopping
    s.away |= (known - answers.keys()) if s.attempt is not None else set()
    # Who is silent to us may have had the ear of a controller that died before it could write it down.
    s.silent = {n: last if n in answers else s.now_s for n, last in s.silent.items()}
    s.cleaning = {}
    s.stopping = set()
    slots = core.spec.nproc_per_node
    s.offered = {n: s.offered.get(n, slots) for n in sorted(answers) if n not in s.excluded}
    for node, answer in answers.items():
        if node in members and answer.attempt == s.attempt and not over:
            s.away.discard(node)
            s.excluded.pop(node, None)
        elif s.attempt is not None and answer.attempt is not None:
            s.away.add(node)


def _settle(core: Moves, answers: dict[str, AgentAnswer]) -> None:
    s = core.state
    whole = all(
        (a := answers.get(m.node)) is not None and a.running and a.attempt == s.attempt
        for m in s.members
    )
    if whole:
        s.started = {m.node for m in s.members}
        s.causes = []
        s.step = max(s.step, min(answers[m.node].step for m in s.members))
        if s.phase != "running":
            core.move("running", "taken over: the gang runs on")
        else:
            s.because = "taken over: the gang runs on"
        core.request("a new controller has taken over")
        wish, s.stop = s.stop, None
        if wish is not None:
            core.ask_stop(wish, at_once=False)
        return
    why = "a new controller found the gang not whole"
    for member in s.members:
        node = member.node
        if node not in answers:
            lost = f"node {node} is lost: it did not answer the new controller"
            s.losses[node] = s.losses.get(node, 0) + 1
            s.silent[node] = s.now_s
            core.blame("node_lost", "node", lost, causes.OUTSIDE, node, None)
    if not s.exits and not s.causes:
        core.blame("taken_over", "unknown", why, causes.OURS, None, None)
    core.request(why)
    # An unclean member is told to stop like the others, by the same command.
    s.away.difference_update(m.node for m in s.members if m.node in answers)
    core.stop(why)
