"""Commands carried out: each over the agents' links or by the store's thread, none by waiting.

A command that cannot be carried out comes back as CommandFailed, or as the NodeLost that explains it.
The record of an attempt (which commit it restored from) is written to the store: for the first
attempt of a term before its ranks start, so that a store that cannot be written is seen at once;
later ones beside the launch, for a restart must not wait for a store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

from perdure.checkpoint import lineage
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.store import Store
from perdure.runtime.beats import Beats
from perdure.runtime.cluster import Cluster
from perdure.runtime.core import codec
from perdure.runtime.core.commands import (
    Command,
    Finish,
    LaunchGang,
    MarkBad,
    RequestNodes,
    SaveNow,
    StopGang,
)
from perdure.runtime.core.events import Attempt, CommandFailed, Event, RestorePoint
from perdure.runtime.fleet import Fleet
from perdure.runtime.spec import JobSpec
from perdure.runtime.storework import StoreWorker
from perdure.runtime.wire import Message

SAVES_TRIED_MAX = 5  # a step named too late is named again further ahead


@dataclass(slots=True)
class Saving:
    attempt: Attempt
    step: int
    tries: int = 1
    late: set[str] = field(default_factory=set)


class Performer:
    def __init__(
        self,
        spec: JobSpec,
        *,
        fleet: Fleet,
        cluster: Cluster,
        store: Store,
        worker: StoreWorker,
        stamp_s: Callable[[], float],
        emit: Callable[[Event], None],
        say: Callable[[str, str], None],
    ) -> None:
        self._spec, self._fleet, self._cluster = spec, fleet, cluster
        self._store, self._worker = store, worker
        self._stamp_s, self._emit, self._say = stamp_s, emit, say
        self._recorded_term = -1
        self._saving: Saving | None = None
        self.beats: Beats | None = None  # of the newest attempt
        self.members: tuple[str, ...] = ()
        self.wanted = 0  # nodes asked for
        self.finished: Finish | None = None

    def perform(self, command: Command) -> None:
        match command:
            case RequestNodes():
                self.wanted = command.count
                self._fleet.bar(command.exclude)
                self._cluster.request(command.count, frozenset(command.exclude))
            case LaunchGang():
                self._launch(command)
            case StopGang():
                self._stop(command)
            case SaveNow():
                self._save(command)
            case MarkBad():
                self._mark_bad(command)
            case Finish():
                self.finished = command
            case _:
                assert_never(command)

    def adopt(
        self, attempt: Attempt, members: tuple[str, ...], restore: RestorePoint | None
    ) -> None:
        """Hear this gang's beats; at a launch, or when it runs already."""
        restored_step = restore.step if restore is not None else 0
        self.beats = Beats(attempt, self._spec.world_size, restored_step=restored_step)
        self.members = members

    def _launch(self, command: LaunchGang) -> None:
        self.adopt(command.attempt, tuple(m.node for m in command.members), command.restore)
        self._saving = None
        parent = _point(command.restore)

        def record() -> None:
            lineage.open_attempt(self._store, str(command.attempt), parent)

        if command.attempt.term == self._recorded_term:
            self._worker.submit(record, lambda result: self._recorded_late(command, result))
            self._send_launch(command)
        else:
            self._worker.submit(record, lambda result: self._recorded_first(command, result))

    def _recorded_first(self, command: LaunchGang, result: object) -> None:
        if self.beats is None or self.beats.attempt != command.attempt:
            return  # stopped and followed by another meanwhile
        if isinstance(result, Exception):
            self._failed(command, f"its record could not be written to the store: {result}")
            return
        self._recorded_term = command.attempt.term
        self._send_launch(command)

    def _recorded_late(self, command: LaunchGang, result: object) -> None:
        if isinstance(result, Exception):
            self._say("", f"the record of attempt {command.attempt} is not in the store: {result}")

    def _send_launch(self, command: LaunchGang) -> None:
        head = min(command.members, key=lambda member: member.group_rank)
        agents = self._fleet.agents
        missing = [m.node for m in command.members if m.node not in agents]
        if missing:
            self._failed(command, "its agent is gone", node=missing[0])
            return
        port = agents[head.node].rendezvous_port
        if not port:
            self._failed(command, "its agent holds no rendezvous port", node=head.node)
            return
        endpoints = [agents[m.node].endpoint for m in command.members]
        message: Message = {
            "kind": "launch",
            "attempt": str(command.attempt),
            "members": codec.encode(command.members),
            "world_size": self._spec.world_size,
            "master_addr": agents[head.node].endpoint.host,
            "master_port": port,
            "restore": codec.encode(command.restore),
            "restarts": command.attempt.counter - 1,
            "peers": [[e.node, e.host, e.port] for e in endpoints],
            "because": command.because,
        }
        for node in self.members:
            self._fleet.command(node, message)

    def _stop(self, command: StopGang) -> None:
        message = {
            "kind": "stop",
            "attempt": str(command.attempt),
            "grace_s": command.grace_s,
            "because": command.because,
        }
        for node in command.nodes:
            if not self._fleet.command(node, message):
                why = "it has no agent to stop anything"
                self._failed(command, why, node=node)

    def _save(self, command: SaveNow) -> None:
        if self.beats is None or self.beats.attempt != command.attempt:
            self._failed(command, "that attempt is over")
            return
        self._name_step(Saving(attempt=command.attempt, step=self.beats.save_step()))

    def _name_step(self, saving: Saving) -> None:
        self._saving = saving
        message = {"kind": "save", "attempt": str(saving.attempt), "step": saving.step}
        self._fleet.tell(self.members, message)

    def save_set(self, message: Message) -> None:
        """An agent's answer to `save`: a rank was past the step already? Then a later one."""
        saving = self._saving
        if saving is None or message.get("step") != saving.step or not message.get("too_late"):
            return
        if self.beats is None or saving.tries >= SAVES_TRIED_MAX:
            self._saving = None
            why = f"the ranks outran {SAVES_TRIED_MAX} steps that were named for it"
            at_s = self._stamp_s()
            self._emit(
                CommandFailed(
                    at_s=at_s, command="save_now", attempt=saving.attempt, node=None, why=why
                )
            )
            return
        # Twice as far ahead each time: the speed that was assumed was too low.
        ahead = self.beats.save_step(saving.step) - saving.step
        step = saving.step + ahead * 2**saving.tries
        self._name_step(Saving(attempt=saving.attempt, step=step, tries=saving.tries + 1))

    def _mark_bad(self, command: MarkBad) -> None:
        point = Point(command.point.step, str(command.point.attempt))

        def then(result: object) -> None:
            if isinstance(result, Exception):
                self._failed(command, f"{point} could not be marked bad: {result}")

        self._worker.submit(lambda: lineage.mark_bad(self._store, point, command.because), then)

    def _failed(self, command: Command, why: str, *, node: str | None = None) -> None:
        kind = str(codec.to_json(command)["kind"])
        attempt = command.attempt if isinstance(command, LaunchGang | StopGang | SaveNow) else None
        at_s = self._stamp_s()
        self._emit(CommandFailed(at_s=at_s, command=kind, attempt=attempt, node=node, why=why))


def _point(restore: RestorePoint | None) -> Point | None:
    return None if restore is None else Point(restore.step, str(restore.attempt))
