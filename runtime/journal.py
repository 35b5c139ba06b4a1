"""What was decided and why, in the run's folder: enough for a new controller to go on from.

A segment is an immutable object of JSON lines, named by term and number. It begins with a snapshot
of the core (`state`) and of what people see (`alive`), and with `over` once the run has ended, so that the last segment alone is enough;
the lines between two snapshots are the story: events, commands with their reasons, notes. It ends
with a `seal`, the SHA-256 of the lines before it: a segment that was cut short or altered is seen as
such, named, and left aside for the one before it.

Writing never blocks the loop and never loses silently. Lines wait in memory; a segment goes out
within a second of a decision, and every SEGMENT_S while nothing happens, which is how others see that
the run is alive. While the store is away lines are kept, up to LINES_MAX; beyond that the oldest go,
and a `lost_lines` line says how many.

Fencing: a term is taken by a create-only put, and each time a segment was written the key of the
next term is looked for. Whoever finds it is no longer the run's controller and must stop acting.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from perdure.checkpoint.errors import CheckpointError, KeyExists
from perdure.checkpoint.store import Store
from perdure.runtime.errors import RunProblem, StoreProblem
from perdure.runtime.storework import StoreWorker

Line = dict[str, Any]

DECISION_S = 0.5  # lines of one decision wait so long for their like
SEGMENT_S = 10.0  # the journal moves at least this often; readers allow 15
RETRY_S = (1.0, 2.0, 5.0, 10.0)
LINES_MAX = 20_000
HEAD = ("state", "alive", "opening", "over")  # kinds of a segment's head: no part of the story
_TERMS_TRIED_MAX = 100


def term_key(term: int) -> str:
    return f"journal/term-{term:06d}.json"


def segment_key(term: int, number: int) -> str:
    return f"journal/{term:06d}-{number:09d}.jsonl"


def take_term(store: Store, *, by: str, at_s: float) -> int:
    """Become the run's controller: the next term, taken create-only.

    Raises StoreProblem when the store cannot be used or others take every term before us.
    """
    claim = json.dumps({"at": at_s, "by": by, "host": socket.gethostname(), "pid": os.getpid()})
    try:
        for _ in range(_TERMS_TRIED_MAX):
            taken = [_term_of(e.key) for e in store.list("journal")]
            term = max((t for t in taken if t is not None), default=0) + 1
            try:
                store.put(term_key(term), claim.encode(), create=True)
            except KeyExists:
                continue
            return term
    except CheckpointError as error:
        raise StoreProblem(f"no term could be taken: {error}", hint=error.hint) from error
    raise StoreProblem(
        "no term could be taken: others took each one first",
        hint="is something restarting this run in a loop?",
    )


def _term_of(key: str) -> int | None:
    name = key.rpartition("/")[2]
    if name.startswith("term-") and name.endswith(".json") and name[5:-5].isdigit():
        return int(name[5:-5])
    return None


def over(at_s: float, exit_code: int, because: str) -> Line:
    """The line in a segment's head that says that the run has ended."""
    return {"kind": "over", "at": at_s, "exit_code": exit_code, "because": because}


def seal(lines: list[Line]) -> bytes:
    """The bytes of a segment."""
    body = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
    end = {"kind": "seal", "sha256": hashlib.sha256(body).hexdigest()}
    return body + json.dumps(end, separators=(",", ":")).encode() + b"\n"


def unseal(data: bytes) -> list[Line]:
    """The lines of a segment. Raises ValueError, in words, when it was cut short or altered."""
    cut = data.rfind(b"\n", 0, -1) + 1
    try:
        end = json.loads(data[cut:])
        given = end["sha256"] if end["kind"] == "seal" else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("it was cut short") from error
    if hashlib.sha256(data[:cut]).hexdigest() != given:
        raise ValueError("it was altered, or cut short")
    return [json.loads(line) for line in data[:cut].splitlines()]


class Journal:
    """The writing side. `head()` gives the lines that a segment begins with, in the loop's thread."""

    def __init__(
        self, store: Store, term: int, worker: StoreWorker, head: Callable[[], list[Line]]
    ) -> None:
        self._store = store
        self._term = term
        self._worker = worker
        self._head = head
        self._number = 0
        self._lines: deque[Line] = deque()
        self._lost = 0
        self._due_s: float | None = None  # when the next segment has to go out
        self._in_flight: tuple[str, bytes] | None = None
        self._failures = 0
        self._now_s = 0.0
        self.problem = ""  # the store's words while segments cannot be written
        self.superseded = False  # another controller has taken a later term

    def append(self, line: Line) -> None:
        if len(self._lines) >= LINES_MAX:
            self._lines.popleft()
            self._lost += 1
        self._lines.append(line)

    def turn(self, now_s: float, *, at_once: bool = False) -> None:
        """Once a turn of the loop, after its lines were appended."""
        self._now_s = now_s
        if self._lines and (self._due_s is None or self._due_s > now_s + DECISION_S):
            self._due_s = now_s + DECISION_S
        if self._due_s is None:
            self._due_s = now_s
        if self._in_flight is not None or self._failures:
            if self._in_flight is not None and self._failures and now_s >= self._due_s:
                self._failures, failures = 0, self._failures
                self._put(*self._in_flight, failures)
            return
        if at_once or now_s >= self._due_s:
            self._cut()

    def deadline_s(self) -> float | None:
        """When `turn` has something to do; None while a put is under way."""
        waits = self._in_flight is not None and not self._failures
        return None if waits else self._due_s

    @property
    def clean(self) -> bool:
        """Everything appended is in the store."""
        return self._in_flight is None and not self._lines

    def _cut(self) -> None:
        lines = self._head()
        if self._lost:
            lines.append({"kind": "lost_lines", "at": self._now_s, "count": self._lost})
            self._lost = 0
        lines += self._lines
        self._lines.clear()
        self._number += 1
        self._in_flight = (segment_key(self._term, self._number), seal(lines))
        self._put(*self._in_flight, 0)

    def _put(self, key: str, data: bytes, failures: int) -> None:
        def put() -> bool:
            try:
                self._store.put(key, data, create=True)
            except KeyExists:
                # An earlier try of ours may have gone through though its answer was lost.
                if self._store.get(key) != data:
                    return True
            return self._store.exists(term_key(self._term + 1))

        self._worker.submit(put, lambda result: self._was_put(result, failures))
        self._due_s = None

    def _was_put(self, result: bool | Exception, failures: int) -> None:
        if isinstance(result, Exception):
            self._failures = failures + 1
            self.problem = str(result)
            self._due_s = self._now_s + RETRY_S[min(failures, len(RETRY_S) - 1)]
            return
        self._in_flight = None
        self.problem = ""
        self.superseded = self.superseded or result
        self._due_s = self._now_s + (DECISION_S if self._lines else SEGMENT_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalView:
    """What a run's journal says. `problems` name what could not be read and was left aside."""

    term: int  # the highest taken; 0: no controller ever was
    last_at: float | None  # seconds since the epoch; None: nothing was ever written
    state: Line | None  # the core's newest snapshot
    status: Line | None  # the newest `alive` status
    opening: Line | None = None  # how a controller that decided nothing yet was told to begin
    finished: tuple[int, str] | None
    problems: tuple[str, ...] = ()
    segments: tuple[str, ...] = field(repr=False, default=())
    store: Store = field(repr=False)

    def events(self, after: str = "") -> Iterator[Line]:
        """Every line but snapshots, oldest first; of segments with a key above `after`.

        A segment that cannot be read gives a line `damaged` with its key and why.
        """
        for key in self.segments:
            if key <= after:
                continue
            try:
                lines = unseal(self.store.get(key))
            except (ValueError, CheckpointError) as error:
                yield {"kind": "damaged", "at": self.last_at, "key": key, "because": str(error)}
                continue
            yield from (line for line in lines if line["kind"] not in HEAD)


def read(store: Store) -> JournalView:
    """Read the newest whole segment. Raises StoreProblem, or RunProblem when none is whole."""
    try:
        keys = [entry.key for entry in store.list("journal")]
        segments = tuple(sorted(key for key in keys if key.endswith(".jsonl")))
        terms = [t for key in keys if (t := _term_of(key)) is not None]
        problems: list[str] = []
        for key in reversed(segments):
            try:
                lines = unseal(store.get(key))
            except ValueError as error:
                problems.append(f"{key}: {error}")
                continue
            return _view(store, terms, segments, lines, tuple(problems))
    except CheckpointError as error:
        raise StoreProblem(f"the journal cannot be read: {error}", hint=error.hint) from error
    if problems:
        raise RunProblem(
            f"no segment of the journal of {store.url} can be read: {problems[0]}",
            hint="restore the folder from a copy; the checkpoints are beside it, under checkpoints/",
        )
    return _view(store, terms, (), [], ())


def _view(
    store: Store,
    terms: list[int],
    segments: tuple[str, ...],
    lines: list[Line],
    problems: tuple[str, ...],
) -> JournalView:
    newest = {line["kind"]: line for line in lines}
    finish = newest.get("over")
    return JournalView(
        store=store,
        term=max(terms, default=0),
        last_at=max((line["at"] for line in lines), default=None),
        state=newest["state"]["core"] if "state" in newest else None,
        status=newest["alive"]["status"] if "alive" in newest else None,
        opening=newest.get("opening"),
        finished=(finish["exit_code"], finish["because"]) if finish is not None else None,
        problems=problems,
        segments=segments,
    )
