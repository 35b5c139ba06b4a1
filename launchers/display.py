"""What is shown while a job runs: plain lines, JSON lines, or the live rows of `screen.py`.

The driver calls `Display.turn` inside its loop and may never wait there: a terminal stopped with
Ctrl-S, or a full pipe, would hold back the acks and let the agents' leases run out. So turns go
through a bounded queue to one thread, which does all the writing. When it cannot keep up, statuses
are dropped, lines are not, up to a bound that is said when it is reached.

Plain lines go to stderr: stdout belongs to the script. Nothing here decides or invents anything.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from perdure.launchers.view import Json, RunView, count, number_of, object_of, text_of
from perdure.launchers.words import blamed, members_of, point_of, sentence

COMMIT_EVERY_S = 30.0  # a job that saves each second must not fill the console
QUEUE = 10_000
CLOSE_S = 2.0


class Writer(Protocol):
    def write(self, text: str, /) -> object: ...
    def flush(self) -> None: ...


class Face(Protocol):
    """One way to show a job. Called from one thread only."""

    def turn(self, status: Json, lines: Sequence[Json]) -> None: ...

    def idle(self) -> None:
        """Called about every 0.25 s without news: ages and times left go on."""

    def end(self, status: Json) -> None: ...


class Plain:
    """A line for each event of note, in the order of their happening."""

    def __init__(self, out: Writer, clock: Callable[[float], str] | None = None) -> None:
        self.out = out
        self.clock = clock or (lambda at: time.strftime("%H:%M:%S", time.localtime(at)))
        self.told_fault_s = float("-inf")
        self.told_waiting = ""
        self.committed_at_s = float("-inf")
        self.launched = False

    def say(self, at_s: float, text: str) -> None:
        for part in text.splitlines() or [""]:
            self.out.write(f"perdure {self.clock(at_s)}  {part}\n")
        self.out.flush()

    def turn(self, status: Json, lines: Sequence[Json]) -> None:
        view = RunView.read(status)
        for fault in view.faults:
            if fault.at_s > self.told_fault_s:
                self.told_fault_s = fault.at_s
                self.say(fault.at_s, f"fault: {fault.because} [blame: {blamed(fault)}]")
        for line in lines:
            text = self._of_note(line)
            if text:
                self.say(number_of(line, "at") or 0.0, text)
        waiting = view.waiting_for if view.phase == "waiting" else ""
        if waiting and waiting != self.told_waiting:
            self.say(_newest(lines), f"waiting for nodes: {waiting}")
        self.told_waiting = waiting

    def _of_note(self, line: Json) -> str:
        kind = text_of(line, "kind")
        if kind == "launch_gang":
            members = members_of(line)
            ranks = sum(nproc for _, _, nproc in members)
            again = " again" if self.launched else ""
            self.launched = True
            where = ", ".join(node for node, _, _ in members)
            return (
                f"attempt {text_of(line, 'attempt')}: start{again} with {count(ranks, 'rank')} on "
                f"{where} from {point_of(object_of(line, 'restore'))}"
            )
        if kind == "checkpoint_committed" and text_of(line, "tier") != "memory":
            at = number_of(line, "at") or 0.0
            if at - self.committed_at_s >= COMMIT_EVERY_S:
                self.committed_at_s = at
                return sentence(line)
            return ""
        shown = {"node_lost", "restore_failed", "mark_bad", "took_over", "stop_asked"}
        return sentence(line) if kind in shown | {"command_failed", "note", "save_asked"} else ""

    def idle(self) -> None:
        return

    def end(self, status: Json) -> None:
        for part in summary(RunView.read(status)):
            self.say(time.time(), part)


class JsonLines:
    """Every journal line as it is, the status when it changed (once a second at most), a summary."""

    def __init__(self, out: Writer, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self.clock = out, clock
        self.last = float("-inf")

    def put(self, thing: Json) -> None:
        self.out.write(json.dumps(thing, default=str) + "\n")
        self.out.flush()

    def turn(self, status: Json, lines: Sequence[Json]) -> None:
        for line in lines:
            if text_of(line, "kind") not in {"state", "alive"}:
                self.put(line)
        if status and self.clock() - self.last >= 1.0:
            self.last = self.clock()
            self.put({"kind": "status", **status})

    def idle(self) -> None:
        return

    def end(self, status: Json) -> None:
        self.put({"kind": "summary", **status})


class Display:
    """Takes turns from the driver without ever making it wait, and shows them on a face."""

    def __init__(self, face: Face) -> None:
        self.face = face
        self.status: Json = {}
        self._queue: queue.Queue[tuple[Json, Sequence[Json]] | None] = queue.Queue(QUEUE)
        self._dropped = 0
        self._thread = threading.Thread(target=self._loop, name="display", daemon=True)
        self._thread.start()

    def __call__(self, status: Json, lines: Sequence[Json]) -> None:
        self.status = status
        if not lines and self._queue.qsize() > 2:
            return  # a newer status is coming
        try:
            self._queue.put_nowait((status, list(lines)))
        except queue.Full:
            self._dropped += len(lines)

    def close(self) -> None:
        """Shows the summary. Waits for a slow console 2 s at most: the exit code must not hang."""
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            self._dropped += 1
        self._thread.join(CLOSE_S)

    def _loop(self) -> None:
        try:
            while True:
                try:
                    item = self._queue.get(timeout=0.25)
                except queue.Empty:
                    self.face.idle()
                    continue
                if item is None:
                    break
                self.face.turn(*item)
            if self._dropped:
                note = f"{self._dropped} events were not shown: see `perdure events`"
                self.face.turn(self.status, [{"kind": "note", "text": note}])
            self.face.end(self.status)
        except (BrokenPipeError, ValueError):
            # Nobody reads any more (`| head`, a closed terminal): the job goes on without a face.
            return


def face_for(*, as_json: bool) -> Face:
    """JSON on stdout, live rows on a terminal, else plain lines on stderr."""
    import os

    if as_json:
        return JsonLines(sys.stdout)
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LateScreen()
    return Plain(sys.stderr)


class LateScreen:
    """The live rows, from the moment that a launch was sent: rich is not imported before."""

    def __init__(self) -> None:
        self.face: Face | None = None
        self.held: list[Json] = []

    def turn(self, status: Json, lines: Sequence[Json]) -> None:
        if self.face is None:
            self.held += lines
            waits = bool(text_of(status, "waiting_for"))
            if not waits and text_of(status, "phase") in {"", "new", "waiting"}:
                return
            from perdure.launchers.screen import Screen

            self.face = Screen(sys.stdout.fileno())
            lines, self.held = self.held, []
        self.face.turn(status, lines)

    def idle(self) -> None:
        if self.face is not None:
            self.face.idle()

    def end(self, status: Json) -> None:
        if self.face is not None:
            self.face.end(status)
        else:
            Plain(sys.stderr).end(status)


def summary(view: RunView) -> list[str]:
    """The last words on a job: what ended it, the first cause with its traceback, where to look."""
    if view.exit_code is None:
        return [f"run {view.run} goes on without this terminal (perdure status {view.run})"]
    said: list[str] = []
    # A fault that was survived is no cause of the end: the core's reason names the rank if it was.
    root = view.root
    if root is not None and f"rank {root.rank} on {root.node}" in view.because:
        said.append(
            f"root cause: rank {root.rank} on {root.node}" + f": {root.error}" * bool(root.error)
        )
        said += [f"  {line}" for line in root.traceback.rstrip().splitlines()]
        if root.log:
            file = (
                "" if root.log.endswith(".log") else "/stderr.log"
            )  # a rank's folder, or its file
            said.append(f"its log: {root.log}{file}")
    outcome = "finished" if view.exit_code == 0 else f"ended with exit code {view.exit_code}"
    because = f": {view.because}" if view.because and view.exit_code != 0 else ""
    facts = [f"step {view.step:,}"] if view.step else []
    if view.restarts:
        facts.append(count(view.restarts, "restart"))
    if view.checkpoint_step is not None:
        facts.append(f"last checkpoint: step {view.checkpoint_step:,}")
    said.append(f"run {view.run} {outcome}{because}" + f" ({', '.join(facts)})" * bool(facts))
    if view.exit_code != 0 and view.log_dir:
        said.append(f"logs: {view.log_dir}")
    if view.exit_code not in {0, None}:
        said.append(f"go on with: perdure resume {view.run}; more: perdure why {view.run}")
    return said


def _newest(lines: Sequence[Json]) -> float:
    return max((number_of(line, "at") or 0.0 for line in lines), default=0.0) or time.time()
