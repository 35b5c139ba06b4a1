import select
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from perdure.checkpoint.errors import StoreUnreachable
from perdure.checkpoint.store import MemoryStore, Store
from perdure.runtime import journal
from perdure.runtime.errors import RunProblem
from perdure.runtime.journal import Journal, Line
from perdure.runtime.storework import StoreWorker


@pytest.fixture
def store() -> Store:
    return MemoryStore(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def worker() -> Iterator[StoreWorker]:
    worker = StoreWorker()
    yield worker
    assert worker.close(5.0)


class Bench:
    """A journal with its loop."""

    def __init__(self, store: Store, worker: StoreWorker, term: int = 1) -> None:
        self.worker = worker
        self.count = 0
        self.journal = Journal(store, term, worker, self.head)

    def head(self) -> list[Line]:
        self.count += 1
        return [
            {"kind": "state", "at": float(self.count), "core": {"n": self.count}},
            {"kind": "alive", "at": float(self.count), "status": {"phase": "running"}},
        ]

    def settle(self) -> None:
        while self.worker.pending:
            assert select.select([self.worker], [], [], 5.0)[0]
            self.worker.drain()


def note(at: float, text: str = "x") -> Line:
    return {"kind": "note", "at": at, "text": text}


def keys(store: Store) -> list[str]:
    return [entry.key for entry in store.list("journal")]


def test_terms_rise_and_two_never_hold_one(store: Store) -> None:
    assert [journal.take_term(store, by="run", at_s=1.0) for _ in range(3)] == [1, 2, 3]


def test_a_lost_race_takes_the_next_term(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real, raced = store.list, []

    def list_then_lose(prefix: str = "") -> list[Any]:
        entries = real(prefix)
        if not raced:
            raced.append(journal.take_term)
            store.put(journal.term_key(1), b"{}", create=True)
        return entries

    monkeypatch.setattr(store, "list", list_then_lose)
    assert journal.take_term(store, by="run", at_s=1.0) == 2
    assert raced


def test_a_decision_is_there_within_a_second(store: Store, worker: StoreWorker) -> None:
    bench = Bench(store, worker)
    bench.journal.turn(100.0)  # the first segment goes out at once
    bench.settle()
    bench.journal.append(note(101.0))
    bench.journal.turn(101.0)
    assert bench.journal.deadline_s() == 101.0 + journal.DECISION_S
    bench.journal.turn(101.5)
    bench.settle()
    assert bench.journal.clean
    assert keys(store) == ["journal/000001-000000001.jsonl", "journal/000001-000000002.jsonl"]
    view = journal.read(store)
    assert view.state == {"n": 2} and view.status == {"phase": "running"}
    assert list(view.events()) == [note(101.0)]
    assert view.finished is None and view.last_at == 101.0


def test_it_moves_while_nothing_happens(store: Store, worker: StoreWorker) -> None:
    bench = Bench(store, worker)
    bench.journal.turn(100.0)
    bench.settle()
    due_s = bench.journal.deadline_s()
    assert due_s is not None and due_s - 100.0 < 15
    bench.journal.turn(due_s)
    bench.settle()
    assert len(keys(store)) == 2


def test_an_outage_keeps_lines_says_so_and_ends(store: Store, worker: StoreWorker) -> None:
    bench = Bench(store, worker)
    tries: list[str] = []
    real = store._put

    def away(key: str, data: Any, create: bool) -> None:
        tries.append(key)
        raise StoreUnreachable("connection refused", hint="wait")

    store._put = away  # type: ignore[method-assign]
    bench.journal.append(note(100.0))
    bench.journal.turn(100.0, at_once=True)
    bench.settle()
    assert bench.journal.problem == "connection refused" and not bench.journal.clean
    bench.journal.append(note(100.1))
    bench.journal.turn(101.5)
    bench.settle()
    store._put = real  # type: ignore[method-assign]
    bench.journal.turn(110.0)
    bench.settle()
    bench.journal.turn(111.0)
    bench.settle()
    assert len(tries) == 2 and bench.journal.problem == "" and bench.journal.clean
    assert list(journal.read(store).events()) == [note(100.0), note(100.1)]


def test_a_long_outage_drops_the_oldest_and_counts_them(
    store: Store, worker: StoreWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "LINES_MAX", 3)
    bench = Bench(store, worker)
    for at in range(5):
        bench.journal.append(note(float(at)))
    bench.journal.turn(10.0, at_once=True)
    bench.settle()
    lines = list(journal.read(store).events())
    assert lines[0] == {"kind": "lost_lines", "at": 10.0, "count": 2}
    assert [line["at"] for line in lines[1:]] == [2.0, 3.0, 4.0]


def test_a_put_whose_answer_was_lost_is_not_written_twice(
    store: Store, worker: StoreWorker
) -> None:
    bench = Bench(store, worker)
    real, lost = store._put, []

    def put_then_lose(key: str, data: Any, create: bool) -> None:
        real(key, data, create)
        if not lost:
            lost.append(key)
            raise StoreUnreachable("the answer was lost", hint="")

    store._put = put_then_lose  # type: ignore[method-assign]
    bench.journal.turn(100.0)
    bench.settle()
    bench.journal.turn(105.0)
    bench.settle()
    assert lost and bench.journal.clean and not bench.journal.superseded
    assert len(keys(store)) == 1


def test_a_later_term_is_noticed(store: Store, worker: StoreWorker) -> None:
    term = journal.take_term(store, by="run", at_s=1.0)
    bench = Bench(store, worker, term)
    bench.journal.turn(1.0)
    bench.settle()
    assert not bench.journal.superseded
    journal.take_term(store, by="resume --takeover", at_s=2.0)
    bench.journal.turn(20.0)
    bench.settle()
    assert bench.journal.superseded


def write(store: Store, key: str, lines: list[Line]) -> None:
    store.put(key, journal.seal(lines), create=True)


def test_the_last_word_is_the_end(store: Store) -> None:
    end = journal.over(9.0, 7, "the script ended with 7")
    write(store, journal.segment_key(1, 1), [{"kind": "state", "at": 9.0, "core": {}}, end])
    assert journal.read(store).finished == (7, "the script ended with 7")
    write(store, journal.segment_key(2, 1), [{"kind": "state", "at": 10.0, "core": {}}])
    assert journal.read(store).finished is None  # resumed since


@pytest.mark.parametrize("damage", ["cut", "cut to nothing", "altered"])
def test_a_damaged_segment_is_named_and_the_one_before_it_used(store: Store, damage: str) -> None:
    write(store, journal.segment_key(1, 1), [{"kind": "state", "at": 1.0, "core": {"n": 1}}])
    whole = journal.seal([{"kind": "state", "at": 2.0, "core": {"n": 2}}, note(2.0)])
    data = {
        "cut": whole[: len(whole) // 2],
        "cut to nothing": b"",
        "altered": whole.replace(b'"n":2', b'"n":3'),
    }[damage]
    assert data != whole
    store.put(journal.segment_key(1, 2), data)
    view = journal.read(store)
    assert view.state == {"n": 1}
    assert "journal/000001-000000002.jsonl" in view.problems[0]
    assert [line["kind"] for line in view.events()] == ["damaged"]


def test_nothing_whole_is_a_problem_of_the_run(store: Store) -> None:
    store.put(journal.segment_key(1, 1), b"{}\n")
    with pytest.raises(RunProblem, match="000001-000000001"):
        journal.read(store)


def test_an_empty_folder_has_no_journal(store: Store) -> None:
    view = journal.read(store)
    assert (view.term, view.last_at, view.state) == (0, None, None)
