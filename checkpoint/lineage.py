"""Which commits are the run's, and the few requests that make, read and judge them.

**The line.** A run's checkpoints are those of its newest attempt, then those of the attempt it
restored from up to that step, and so on. A commit that a stopped attempt made after its successor
had restored an older one is off the line: training did not go on from it. It stays listed, and is
never restored by itself. A rollback (`resume --step N`) is nothing more than an attempt whose
parent is step N.

**Meeting without talking.** All writers of an attempt call `open_attempt`; the first create-only
put of the attempt's record fixes a random nonce, the others read it, and it names the folder of
each of the attempt's steps. Two gangs that wrongly hold the same attempt number still cannot mix
their objects unnoticed: they would share the record, whose parent both must agree to.

**A step is saved once an attempt.** Its keys are taken; a second save is refused with StateError.

**Committing** is a pure function of the receipts (`assembly.py`), so anybody may do it at any time,
and again: whoever loses the race finds its own bytes. Manifest first, commit second: a crash
between leaves a manifest that the next `try_commit` finds equal.

**Trust** goes from the commit downwards by sha256; a missing or altered record below a commit is
IntegrityError or FormatError, upon which the commit is marked bad (create-only) and left alone.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from perdure.checkpoint import keys
from perdure.checkpoint.assembly import commit_of, manifest_of
from perdure.checkpoint.codec import decode, digest, encode
from perdure.checkpoint.errors import (
    FormatError,
    IntegrityError,
    KeyExists,
    KeyMissing,
    StateError,
)
from perdure.checkpoint.manifest import (
    AttemptRecord,
    BadMark,
    Commit,
    Manifest,
    ObjectRef,
    Point,
    Receipt,
    attempt_order,
)
from perdure.checkpoint.store import Entry, Store

A = TypeVar("A")
B = TypeVar("B")
_LOST_SHOWN = 3
_REQUESTS = 16  # at once: small records, so latency is what counts
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class History:
    """What the store knows of a run's checkpoints. `unreadable` are records, with what is wrong."""

    commits: tuple[Commit, ...]
    attempts: tuple[AttemptRecord, ...]
    bad: tuple[BadMark, ...]
    unreadable: tuple[tuple[str, str], ...] = ()

    @property
    def newest_attempt(self) -> str | None:
        """The highest attempt that left a trace here: a new one must be higher."""
        names = {c.attempt for c in self.commits} | {a.attempt for a in self.attempts}
        return max(names, key=attempt_order, default=None)


def line(history: History) -> list[Commit]:
    """The run's checkpoints that can be restored, newest first."""
    parents: dict[str, Point | None] = {c.attempt: c.parent for c in history.commits}
    parents.update({a.attempt: a.parent for a in history.attempts})
    bad = {mark.point for mark in history.bad}
    found: list[Commit] = []
    attempt, upto, seen = history.newest_attempt, keys.STEP_MAX, set[str]()
    while attempt is not None and attempt not in seen:
        seen.add(attempt)
        own = [c for c in history.commits if c.attempt == attempt and c.step <= upto]
        own.sort(key=lambda commit: -commit.step)
        found += [commit for commit in own if commit.point not in bad]
        parent = parents.get(attempt)
        if parent is None:
            break
        attempt, upto = parent.attempt, min(upto, parent.step)
    return found


def restorable(history: History) -> list[Commit]:
    """The line, for whoever is about to restore its newest.

    Raises StateError when it is empty because of damage: a run that has trained must never start
    from nothing in silence. Empty because nothing was committed, or because a newer attempt began
    from nothing, is the truth and no error.
    """
    found = line(history)
    if found:
        return found
    lost = [why for key, why in history.unreadable if key.startswith((keys.COMMITS, keys.ATTEMPTS))]
    marked = {mark.point: mark.why for mark in history.bad}
    lost += [
        f"{commit.point} is marked bad: {marked[commit.point]}"
        for commit in line(replace(history, bad=()))
    ]
    if lost:
        raise StateError(
            f"no checkpoint of this run can be restored; {'; '.join(lost[:_LOST_SHOWN])}",
            hint="Name one with --step (or `restore(step=)`) to try it all the same; to start from "
            "nothing, use another --store.",
        )
    return []


def off_line(history: History) -> list[Commit]:
    """All other commits, the bad ones among them, newest first: listed, never restored alone."""
    on = {commit.point for commit in line(history)}
    rest = [commit for commit in history.commits if commit.point not in on]
    return sorted(rest, key=lambda c: (attempt_order(c.attempt), c.step), reverse=True)


def commit_at(history: History, step: int) -> Commit:
    """The commit that a person means by a step: on the line, else of the newest attempt that has it.

    Raises StateError, naming the steps there are, when there is none that is good.
    """
    bad = {mark.point for mark in history.bad}
    ordered = [*line(history), *(c for c in off_line(history) if c.point not in bad)]
    for commit in ordered:
        if commit.step == step:
            return commit
    there = ", ".join(str(s) for s in sorted({c.step for c in ordered})[-10:]) or "none"
    raise StateError(
        f"there is no good checkpoint of step {step}", hint=f"The newest that there are: {there}."
    )


def read_history(store: Store) -> History:
    """All commits, attempts and bad marks. Records that cannot be read are named, not raised."""
    unreadable: list[tuple[str, str]] = []

    def load(kind: type[A], prefix: str) -> tuple[A, ...]:
        def one(entry: Entry) -> A | None:
            try:
                return decode(kind, store.get(entry.key), entry.key)  # type: ignore[type-var]
            except KeyMissing:
                return None  # deleted between the list and here
            except FormatError as error:
                unreadable.append((entry.key, str(error)))
                return None

        found = _at_once(one, store.list(prefix))
        return tuple(record for record in found if record is not None)

    commits = load(Commit, keys.COMMITS)
    attempts = load(AttemptRecord, keys.ATTEMPTS)
    bad = load(BadMark, keys.BAD)
    # A mark that cannot be read still marks: its name says what.
    marks = [(keys.point_of(key), why) for key, why in unreadable if key.startswith(keys.BAD)]
    unread = tuple(BadMark(step=p.step, attempt=p.attempt, why=why) for p, why in marks if p)
    return History(commits, attempts, bad + unread, tuple(sorted(unreadable)))


def open_attempt(store: Store, attempt: str, parent: Point | None) -> AttemptRecord:
    """The record of `attempt`, made by whoever comes first. The same for all of its writers.

    Raises StateError when another parent is on record: somebody else holds the same attempt.
    """
    attempt_order(attempt)
    key = keys.attempt_key(attempt)
    mine = AttemptRecord(attempt=attempt, parent=parent, nonce=uuid.uuid4().hex[:16])
    try:
        store.put(key, encode(mine), create=True)
    except KeyExists:
        mine = decode(AttemptRecord, store.get(key), key)
    if (mine.attempt, mine.parent) != (attempt, parent):
        raise StateError(
            f"attempt {attempt} is on record as restored from {mine.parent}, not from {parent}",
            hint="Two jobs use the same run's folder: stop one of them, or name another --store.",
        )
    return mine


def take_attempt(store: Store, parent: Point | None) -> AttemptRecord:
    """A new attempt, higher than all on record: for a job without a controller."""
    for _ in range(100):
        term, counter = attempt_order(read_history(store).newest_attempt or "1.0")
        mine = AttemptRecord(
            attempt=f"{term}.{counter + 1}", parent=parent, nonce=uuid.uuid4().hex[:16]
        )
        key = keys.attempt_key(mine.attempt)
        try:
            store.put(key, encode(mine), create=True)
        except KeyExists:
            if store.get(key) != encode(mine):  # else our own put, answered to its retry
                continue
        return mine
    raise StateError(
        "100 other jobs took an attempt in this run's folder just now",
        hint="A run's folder belongs to one job: give each job a folder of its own.",
    )


def mark_bad(store: Store, point: Point, why: str) -> None:
    """From now on no restore takes this commit by itself. The first reason given stays."""
    mark = BadMark(step=point.step, attempt=point.attempt, why=why[:2000])
    try:
        store.put(keys.bad_key(point), encode(mark), create=True)
    except KeyExists:
        _log.info("%s was marked bad before", point)


def load_commit(store: Store, point: Point) -> Commit:
    """Raises KeyMissing when there is none, FormatError when it is not whole."""
    key = keys.commit_key(point)
    commit = decode(Commit, store.get(key), key)
    if commit.point != point:
        raise FormatError(f"{key} holds the commit of {commit.point}")
    return commit


def load_manifest(store: Store, commit: Commit) -> Manifest:
    """Raises IntegrityError when it is missing or altered, FormatError when it is too new."""
    data = _trusted(store, commit.manifest, commit.sha256)
    manifest = decode(Manifest, data, commit.manifest)
    if commit_of(manifest, commit.manifest) != commit:
        raise IntegrityError(
            f"the commit of {commit.point} does not match its manifest",
            key=keys.commit_key(commit.point),
        )
    return manifest


def load_receipts(
    store: Store, manifest: Manifest, writers: Iterable[int] | None = None
) -> dict[int, Receipt]:
    """The receipts of `writers` (all by default), each verified against the manifest."""
    wanted = range(manifest.writers) if writers is None else sorted(set(writers))

    def one(ref: ObjectRef) -> Receipt:
        receipt = decode(Receipt, _trusted(store, ref.receipt, ref.sha256), ref.receipt)
        if (receipt.writer, receipt.key, receipt.size) != (ref.writer, ref.key, ref.size):
            raise IntegrityError(f"{ref.receipt} speaks of another object", key=ref.receipt)
        return receipt

    found = _at_once(one, [manifest.objects[writer] for writer in wanted])
    return {receipt.writer: receipt for receipt in found}


def _trusted(store: Store, key: str, sha256: str) -> bytes:
    try:
        data = store.get(key)
    except KeyMissing as error:
        raise IntegrityError(f"{key} is missing", key=key) from error
    if digest(data) != sha256:
        raise IntegrityError(f"{key} was altered: its sha256 is not the one on record", key=key)
    return data


def refuse_second_save(store: Store, folder: str, writer: int) -> None:
    """Raises StateError when this writer has put something of this step already."""
    for key in (keys.object_key(folder, writer), keys.receipt_key(folder, writer)):
        if store.exists(key):
            raise StateError(
                f"{key} is there already: an attempt saves a step once",
                hint="Call save with a step that rises.",
            )


def try_commit(store: Store, folder: str) -> Commit | None:
    """Commit the step whose objects lie in `folder`, if every writer's receipt is there.

    The commit, whoever made it; None while receipts are missing. Raises StateError when the parts
    do not make a whole, IntegrityError when an object is not there as its receipt says.
    """
    named = keys.folder_of(f"{folder}/x")
    if named is None:
        raise ValueError(f"{folder!r} is not a folder of a step")
    point = named[1]
    if store.exists(keys.commit_key(point)):
        return load_commit(store, point)
    entries = {entry.key: entry.size for entry in store.list(folder)}
    there = [key for key in entries if keys.writer_of(key) is not None]
    if not there:
        return None
    one = _stored(store, there[0], entries, point)
    if len(there) < one[0].writers:
        return None
    rest = _at_once(lambda key: _stored(store, key, entries, point), there[1:])
    manifest = manifest_of([one, *rest])
    key = keys.manifest_key(folder)
    commit = commit_of(manifest, key)
    put_or_find(store, key, encode(manifest))
    put_or_find(store, keys.commit_key(point), encode(commit))
    return commit


def commit_complete(
    store: Store, note: Callable[[str], None] = lambda text: _log.warning("%s", text)
) -> list[Commit]:
    """Commit every step that has all its receipts and no commit: what a dead controller left.

    `note` is told of steps that are complete but cannot be committed.
    """
    committed = {keys.point_of(entry.key) for entry in store.list(keys.COMMITS)}
    folders: dict[str, Point] = {}
    for entry in store.list(keys.OBJECTS):
        if keys.writer_of(entry.key) is not None and (named := keys.folder_of(entry.key)):
            folders[named[0]] = named[1]
    made = []
    for folder, point in folders.items():
        if point in committed:
            continue
        try:
            commit = try_commit(store, folder)
        except (StateError, IntegrityError, FormatError) as error:
            note(f"{point} cannot be committed: {error}")
            continue
        made += [commit] if commit else []
    return made


def _stored(
    store: Store, key: str, entries: dict[str, int], point: Point
) -> tuple[Receipt, ObjectRef]:
    data = store.get(key)
    receipt = decode(Receipt, data, key)
    if Point(receipt.step, receipt.attempt) != point or keys.writer_of(key) != receipt.writer:
        raise FormatError(f"{key} is the receipt of another save")
    if entries.get(receipt.key) != receipt.size:
        raise IntegrityError(
            f"{receipt.key} has {entries.get(receipt.key, 'no')} bytes, not {receipt.size}",
            key=receipt.key,
        )
    return receipt, ObjectRef(receipt.writer, receipt.key, receipt.size, key, digest(data))


def put_or_find(store: Store, key: str, data: bytes) -> None:
    """Create-only, and content to find its own bytes there: a put may be asked twice."""
    try:
        store.put(key, data, create=True)
    except KeyExists:
        if store.get(key) != data:
            raise FormatError(f"{key} is there, and is not what the receipts make") from None


def _at_once(do: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """`do` for every item, in order; the first error is raised once all have ended."""
    ordered = list(items)
    if len(ordered) < 2:
        return [do(item) for item in ordered]
    with ThreadPoolExecutor(min(_REQUESTS, len(ordered))) as pool:
        return list(pool.map(do, ordered))
