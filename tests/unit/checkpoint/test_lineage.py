"""The line, and committing against stores that race, fail and lie."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import replace

import pytest

from perdure.checkpoint import keys
from perdure.checkpoint.boxes import Box
from perdure.checkpoint.codec import encode
from perdure.checkpoint.errors import (
    FormatError,
    IntegrityError,
    KeyExists,
    StateError,
    StoreUnreachable,
)
from perdure.checkpoint.lineage import (
    History,
    commit_at,
    commit_complete,
    line,
    load_commit,
    load_manifest,
    load_receipts,
    mark_bad,
    off_line,
    open_attempt,
    read_history,
    refuse_second_save,
    restorable,
    take_attempt,
    try_commit,
)
from perdure.checkpoint.manifest import AttemptRecord, BadMark, Chunk, Commit, Point, Receipt
from perdure.checkpoint.store import Buffer, MemoryStore, Store, open_store


def commit(step: int, attempt: str, parent: Point | None = None) -> Commit:
    return Commit(
        step=step,
        attempt=attempt,
        parent=parent,
        manifest="m",
        sha256="0",
        bytes=1,
        world_size=1,
        committed_at=float(step),
    )


def history(
    *attempts: tuple[str, Point | None, tuple[int, ...]], bad: tuple[Point, ...] = ()
) -> History:
    """(attempt, what it restored from, steps it committed)."""
    return History(
        tuple(commit(step, name, parent) for name, parent, steps in attempts for step in steps),
        tuple(
            AttemptRecord(attempt=name, parent=parent, nonce="0") for name, parent, _ in attempts
        ),
        tuple(BadMark(step=p.step, attempt=p.attempt, why="test") for p in bad),
    )


def points(commits: list[Commit]) -> list[str]:
    return [f"{c.step}@{c.attempt}" for c in commits]


A10, A20 = Point(10, "1.1"), Point(20, "1.1")


@pytest.mark.parametrize(
    ("case", "expected", "off"),
    [
        pytest.param(history(), [], [], id="nothing yet"),
        pytest.param(history(("1.1", None, (10, 20))), ["20@1.1", "10@1.1"], [], id="one attempt"),
        pytest.param(
            history(("1.1", None, (10, 20)), ("1.2", A20, (30,))),
            ["30@1.2", "20@1.1", "10@1.1"],
            [],
            id="gone on",
        ),
        pytest.param(
            history(("1.1", None, (10, 20)), ("1.2", A10, (20,))),
            ["20@1.2", "10@1.1"],
            ["20@1.1"],
            id="a commit that came after its successor restored an older one",
        ),
        pytest.param(
            history(("1.1", None, (10, 20)), ("1.2", A10, ())),
            ["10@1.1"],
            ["20@1.1"],
            id="an attempt without a commit decides too",
        ),
        pytest.param(
            history(("1.1", None, (10,)), ("1.2", None, ())),
            [],
            ["10@1.1"],
            id="begun anew from nothing",
        ),
        pytest.param(
            history(("1.1", None, (10, 20)), ("1.2", A20, (30,)), bad=(A20, Point(30, "1.2"))),
            ["10@1.1"],
            ["30@1.2", "20@1.1"],
            id="bad ones are left out, and what lies below them is not",
        ),
        pytest.param(
            history(
                ("1.1", None, (10, 20, 30)), ("1.2", Point(30, "1.1"), (40,)), ("2.3", A20, (25,))
            ),
            ["25@2.3", "20@1.1", "10@1.1"],
            ["40@1.2", "30@1.1"],
            id="a rollback",
        ),
        pytest.param(
            history(("1.9", None, (5,)), ("1.10", Point(5, "1.9"), (6,)), ("2.11", None, ())),
            [],
            ["6@1.10", "5@1.9"],
            id="attempts are numbers, not text",
        ),
        pytest.param(
            history(
                ("1.1", None, (10, 20, 30)),
                ("1.2", Point(10, "1.1"), (30,)),
                ("1.3", Point(30, "1.1"), (35,)),
            ),
            ["35@1.3", "30@1.1", "20@1.1", "10@1.1"],
            ["30@1.2"],
            id="by a person's word back to a branch",
        ),
    ],
)
def test_the_line(case: History, expected: list[str], off: list[str]) -> None:
    assert points(line(case)) == expected
    assert points(off_line(case)) == off


def test_records_that_point_in_a_circle_end() -> None:
    loop = history(("1.1", Point(9, "1.2"), (5,)), ("1.2", Point(5, "1.1"), (7,)))
    assert points(line(loop)) == ["7@1.2", "5@1.1"]


def test_a_step_is_found_on_the_line_before_elsewhere() -> None:
    case = history(("1.1", None, (10, 20)), ("1.2", A10, (20, 25)), bad=(Point(25, "1.2"),))
    assert commit_at(case, 20).attempt == "1.2"
    assert commit_at(history(("1.1", None, (10, 20)), ("1.2", A10, ())), 20).attempt == "1.1"
    with pytest.raises(StateError, match="no good checkpoint of step 25") as told:
        commit_at(case, 25)
    assert "10, 20" in told.value.hint


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")


PARENT = Point(20, "1.1")


def receipt(folder: str, writer: int, writers: int, **changed: object) -> Receipt:
    box = Box((4 * writer, 0), (4, 4))
    plain = Receipt(
        step=40,
        attempt="1.2",
        parent=PARENT,
        writer=writer,
        writers=writers,
        key=keys.object_key(folder, writer),
        size=128,
        data_start=64,
        crc32c=(1,),
        header_crc32c=2,
        chunks=(Chunk("w", "float32", (4 * writers, 4), box, 0, 64),),
        names="n",
        world_size=writers,
        started_at=1.0,
        finished_at=2.0 + writer,
    )
    return replace(plain, **changed)  # type: ignore[arg-type]


def put_object(store: Store, folder: str, writer: int) -> None:
    store.put(keys.object_key(folder, writer), bytes(128))


def put_receipt(store: Store, folder: str, writer: int, writers: int) -> None:
    data = encode(receipt(folder, writer, writers))
    store.put(keys.receipt_key(folder, writer), data, create=True)


def saved(store: Store, writers: int = 2) -> str:
    """All objects and receipts of step 40 are there, nothing is committed."""
    folder = keys.folder_key(40, open_attempt(store, "1.2", PARENT))
    for writer in range(writers):
        put_object(store, folder, writer)
        put_receipt(store, folder, writer, writers)
    return folder


def test_writers_meet_in_one_folder_without_talking(store: Store) -> None:
    first, second = (open_attempt(store, "1.2", PARENT) for _ in range(2))
    assert first == second
    assert keys.folder_key(40, first).startswith("checkpoints/objects/step-000000000040/1.2-")
    with pytest.raises(StateError, match="attempt 1.2 is on record"):
        open_attempt(store, "1.2", None)
    other = open_attempt(store, "1.3", PARENT)
    assert other.nonce != first.nonce


def test_attempts_taken_from_the_store_rise(store: Store) -> None:
    assert take_attempt(store, None).attempt == "1.1"
    assert take_attempt(store, None).attempt == "1.2"
    open_attempt(store, "3.7", None)
    assert take_attempt(store, Point(1, "1.1")).attempt == "3.8"
    assert read_history(store).newest_attempt == "3.8"


def test_the_last_writer_commits_and_everybody_finds_the_same(store: Store) -> None:
    folder = keys.folder_key(40, open_attempt(store, "1.2", PARENT))
    assert try_commit(store, folder) is None
    for writer in range(3):
        put_object(store, folder, writer)
        assert try_commit(store, folder) is None
        put_receipt(store, folder, writer, 3)
    made = try_commit(store, folder)
    assert made is not None
    assert (made.point, made.parent, made.committed_at) == (Point(40, "1.2"), PARENT, 4.0)
    assert try_commit(store, folder) == made
    assert load_commit(store, made.point) == made
    manifest = load_manifest(store, made)
    assert load_receipts(store, manifest, [1]) == {1: receipt(folder, 1, 3)}
    assert sorted(load_receipts(store, manifest)) == [0, 1, 2]
    assert line(read_history(store)) == [made]


class DiesAt(MemoryStore):
    """A store whose user dies at its n-th put: before it is done, or right after."""

    def __init__(self, url: str, fatal: int, after: bool) -> None:
        super().__init__(url)
        self._fatal, self._after, self.died = fatal, after, False
        self._count = itertools.count(1)

    def _put(self, key: str, data: Buffer, create: bool) -> None:
        dies = next(self._count) == self._fatal
        if dies and not self._after:
            self.died = True
            raise StoreUnreachable("died before")
        super()._put(key, data, create)
        if dies:
            self.died = True
            raise StoreUnreachable("died after")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("fatal", [1, 2])
def test_a_death_at_any_put_of_a_commit_is_mended_by_the_next(
    store: Store, fatal: int, after: bool
) -> None:
    folder = saved(store)
    mortal = DiesAt(store.url, fatal, after)
    with pytest.raises(StoreUnreachable):
        try_commit(mortal, folder)
    assert mortal.died
    commits = commit_complete(store)
    done = fatal == 2 and after  # the commit itself went through
    assert points(commits) == ([] if done else ["40@1.2"])
    assert points(line(read_history(store))) == ["40@1.2"]
    assert commit_complete(store) == []


def test_recovery_leaves_what_is_incomplete_alone_and_names_what_is_wrong(store: Store) -> None:
    folder = keys.folder_key(40, open_attempt(store, "1.2", PARENT))
    put_object(store, folder, 0)
    put_receipt(store, folder, 0, 2)
    notes: list[str] = []
    assert commit_complete(store, notes.append) == []
    assert notes == []
    put_receipt(store, folder, 1, 2)  # a receipt without its object: a store that lost it
    assert commit_complete(store, notes.append) == []
    assert len(notes) == 1
    assert "step 40 of attempt 1.2 cannot be committed" in notes[0]
    assert "w1.safetensors has no bytes, not 128" in notes[0]


def test_parts_that_do_not_make_a_whole_are_never_committed(store: Store) -> None:
    folder = keys.folder_key(40, open_attempt(store, "1.2", PARENT))
    for writer in range(2):
        put_object(store, folder, writer)
        wrong = receipt(folder, writer, 2, chunks=receipt(folder, 0, 2).chunks)
        store.put(keys.receipt_key(folder, writer), encode(wrong))
    with pytest.raises(StateError, match="overlap"):
        try_commit(store, folder)
    assert store.list(keys.COMMITS) == []


def test_a_manifest_that_is_not_ours_stops_the_commit(store: Store) -> None:
    folder = saved(store)
    store.put(keys.manifest_key(folder), b"something else")
    with pytest.raises(FormatError, match="is not what the receipts make"):
        try_commit(store, folder)
    assert store.list(keys.COMMITS) == []


def test_a_step_is_saved_once_an_attempt(store: Store) -> None:
    folder = saved(store)
    with pytest.raises(StateError, match="an attempt saves a step once"):
        refuse_second_save(store, folder, 0)
    refuse_second_save(store, folder, 2)
    with pytest.raises(KeyExists):
        put_receipt(store, folder, 0, 2)


def altered(store: Store, key: str, how: str) -> None:
    data = store.get(key)
    if how == "missing":
        store.delete(key)
    elif how == "cut short":
        store.put(key, data[: len(data) // 2])
    else:
        store.put(key, data[:50] + bytes([data[50] ^ 1]) + data[51:])


@pytest.mark.parametrize("how", ["missing", "cut short", "a flipped bit"])
def test_trust_goes_down_the_chain(store: Store, how: str) -> None:
    folder = saved(store)
    commit = try_commit(store, folder)
    assert commit
    manifest = load_manifest(store, commit)
    altered(store, keys.receipt_key(folder, 1), how)
    assert load_receipts(store, manifest, [0])
    with pytest.raises(IntegrityError, match="w1.receipt.json") as told:
        load_receipts(store, manifest)
    assert told.value.key == keys.receipt_key(folder, 1)
    altered(store, keys.manifest_key(folder), how)
    with pytest.raises(IntegrityError, match="manifest.json"):
        load_manifest(store, commit)


def test_a_commit_of_another_manifest_is_refused(store: Store) -> None:
    commit = try_commit(store, saved(store))
    assert commit
    with pytest.raises(IntegrityError, match="does not match its manifest"):
        load_manifest(store, replace(commit, world_size=7))
    store.put(keys.commit_key(Point(41, "1.2")), store.get(keys.commit_key(commit.point)))
    with pytest.raises(FormatError, match="holds the commit of step 40"):
        load_commit(store, Point(41, "1.2"))


def test_a_bad_commit_leaves_the_line_and_the_first_reason_stays(store: Store) -> None:
    commit = try_commit(store, saved(store))
    assert commit
    mark_bad(store, commit.point, "block 0 of w1")
    mark_bad(store, commit.point, "again")
    seen = read_history(store)
    assert [mark.why for mark in seen.bad] == ["block 0 of w1"]
    assert line(seen) == []
    assert off_line(seen) == [commit]


def test_unreadable_records_are_named_and_do_not_hide_the_others(store: Store) -> None:
    commit = try_commit(store, saved(store))
    assert commit
    store.put("checkpoints/commits/000000000050-1.2.json", b'{"kind":"commit"')
    store.put("checkpoints/bad/000000000040-1.2.json", b"")
    seen = read_history(store)
    assert seen.commits == (commit,)
    assert [key for key, _ in seen.unreadable] == [
        "checkpoints/bad/000000000040-1.2.json",
        "checkpoints/commits/000000000050-1.2.json",
    ]
    assert line(seen) == []  # a mark that cannot be read still marks


def test_a_line_that_damage_has_emptied_is_an_error_and_no_new_run(store: Store) -> None:
    assert restorable(read_history(store)) == [], "a run that has not committed yet"
    commit = try_commit(store, saved(store))
    assert commit
    assert restorable(read_history(store)) == [commit]
    altered(store, keys.commit_key(commit.point), "a flipped bit")
    with pytest.raises(StateError, match="000000000040-1.2.json"):
        restorable(read_history(store))


def test_a_line_of_bad_commits_is_an_error_unless_a_newer_attempt_began_anew() -> None:
    bad = (Point(10, "1.1"),)
    with pytest.raises(StateError, match="step 10 .*is marked bad: test"):
        restorable(history(("1.1", None, (10,)), bad=bad))
    assert restorable(history(("1.1", None, (10,)), ("1.2", None, ()), bad=bad)) == []
