"""Journal lines in words, and the story that `perdure why` tells. The texts are golden."""

from __future__ import annotations

import time
from typing import get_args

import pytest

from perdure.launchers.view import Json, RunView, span
from perdure.launchers.words import SILENT, Tale, sentence, story, time_of
from perdure.runtime.core import codec
from perdure.runtime.core.commands import Command
from perdure.runtime.core.events import Event

T = 1_700_000_000.0
MEMBERS = [["n0", 0, 0, 2], ["n1", 1, 2, 2]]


def launch(
    attempt: str, at: float, restore: Json | None = None, because: str = "all ready"
) -> Json:
    return {
        "kind": "launch_gang",
        "at": at,
        "attempt": attempt,
        "members": MEMBERS,
        "restore": restore,
        "because": because,
    }


def exit_line(at: float, **report: object) -> Json:
    raw = {"rank": 3, "node": "n1", "at": at, "by_us": False, "oom": False, **report}
    return {"kind": "rank_exited", "at": at, "attempt": "1.1", "report": raw}


KILLED = {
    "at": T + 10.0,
    "kind": "rank_signal",
    "blame": "unknown",
    "rank": 3,
    "node": "n1",
    "because": "rank 3 on n1 was ended by SIGKILL",
}
JOURNAL: list[Json] = [
    {"kind": "started", "at": T, "term": 1, "counter": 0, "line": [], "by": "perdure run"},
    {"kind": "nodes_offered", "at": T, "nodes": [["n0", 2], ["n1", 2]], "waiting_for": ""},
    launch("1.1", T + 0.1),
    {"kind": "gang_started", "at": T + 0.4, "attempt": "1.1", "node": "n0"},
    {"kind": "gang_started", "at": T + 0.5, "attempt": "1.1", "node": "n1"},
    {"kind": "checkpoint_committed", "at": T + 8, "attempt": "1.1", "step": 1200, "tier": "store"},
    exit_line(T + 10.0, signal=9),
    exit_line(
        T + 10.1, rank=0, node="n0", exit_code=1, error="ConnectionError: peer", where="t.py:3"
    ),
    {"kind": "state", "at": T + 10.1, "core": {"faults": [KILLED]}},
    launch("1.2", T + 10.05, {"step": 1200, "attempt": "1.1"}, "rank 3 on n1 was ended by SIGKILL"),
    {"kind": "gang_started", "at": T + 10.13, "attempt": "1.2", "node": "n0"},
    {"kind": "gang_started", "at": T + 10.14, "attempt": "1.2", "node": "n1"},
    {"kind": "finish", "at": T + 60, "exit_code": 0, "because": "every rank has finished"},
]


def test_every_event_and_command_has_its_words() -> None:
    """A new kind falls back to its name, which is not what people should read."""
    kinds = {codec._KIND_OF[cls] for cls in (*get_args(Event), *get_args(Command))}
    from perdure.launchers.words import _TELLERS

    assert kinds - set(_TELLERS) - SILENT == set()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            launch("1.2", T, {"step": 1200, "attempt": "1.1"}),
            "attempt 1.2: start 4 ranks on n0, n1 from step 1,200 (all ready)",
        ),
        (launch("1.1", T), "attempt 1.1: start 4 ranks on n0, n1 from the beginning (all ready)"),
        (exit_line(T, signal=9), "rank 3 on n1 was ended by signal 9 (SIGKILL)"),
        (
            exit_line(T, signal=9, by_us=True),
            "rank 3 on n1 was ended by signal 9 (SIGKILL), as told",
        ),
        (
            exit_line(T, signal=9, oom=True),
            "rank 3 on n1 was ended by the kernel for want of memory",
        ),
        (exit_line(T, signal=77), "rank 3 on n1 was ended by signal 77"),
        (exit_line(T, exit_code=0), "rank 3 on n1 has finished"),
        (
            exit_line(T, exit_code=1, error="ValueError: no", where="t.py:3 in main"),
            "rank 3 on n1 ended with exit code 1: ValueError: no (t.py:3 in main)",
        ),
        (
            {"kind": "node_lost", "at": T, "node": "n1", "why": "its port refuses"},
            "node n1 is lost: its port refuses",
        ),
        (
            {"kind": "nodes_offered", "at": T, "nodes": [], "waiting_for": "1 of 2 nodes"},
            "nodes ready: none; waiting: 1 of 2 nodes",
        ),
        (
            {"kind": "stop_gang", "attempt": "1.1", "nodes": ["n0"], "grace_s": 30, "because": "x"},
            "attempt 1.1: end its ranks on n0 within 30 s (x)",
        ),
        (
            {
                "kind": "stop_gang",
                "attempt": "1.1",
                "nodes": ["n0"],
                "grace_s": 0.0,
                "because": "x",
            },
            "attempt 1.1: end its ranks on n0 at once (x)",
        ),
        (
            {
                "kind": "restore_failed",
                "attempt": "1.2",
                "point": {"step": 40, "attempt": "1.1"},
                "rank": 2,
                "why": "w2.safetensors: block 3 is altered",
            },
            "rank 2 could not restore step 40: w2.safetensors: block 3 is altered",
        ),
        (
            {"kind": "request_nodes", "count": 3, "exclude": ["n1"], "because": "n1 is silent"},
            "ask the cluster for 3 nodes, not n1 (n1 is silent)",
        ),
        (
            {"kind": "seen_on_mars", "at": T, "rank": 3, "because": "dust"},
            "seen on mars (rank 3): dust",
        ),
        ({"kind": "state", "at": T, "core": {}}, ""),
    ],
)
def test_sentences(line: Json, text: str) -> None:
    assert sentence(line) == text


def told(lines: list[Json]) -> Tale:
    tale = Tale()
    for line in lines:
        tale.add(line)
    return tale


def test_the_story_of_a_fault() -> None:
    assert story(told(JOURNAL)) == [
        f"1. {time_of(T + 10)}  rank 3 on n1 was ended by SIGKILL",
        "   blame: unknown, the evidence does not say",
        "   also:  rank 0 on n0 ended with exit code 1: ConnectionError: peer (t.py:3)",
        "   done:  attempt 1.2 on n0, n1 from step 1,200, running after 0.14 s",
        f"end: {time_of(T + 60)}  exit code 0: every rank has finished",
    ]


def test_a_quiet_story() -> None:
    assert story(told(JOURNAL[:5])) == ["no fault was seen"]


def test_a_resume_takes_the_end_back() -> None:
    again: Json = {"kind": "started", "at": T + 90, "term": 2, "by": "resume"}
    assert told([*JOURNAL, again]).finished is None


def test_where_a_rank_s_log_lies() -> None:
    tale = told(JOURNAL)
    assert [tale.launches[1].log_of(rank) for rank in (0, 3, 9)] == [
        ("attempt_1/0", "n0"),
        ("attempt_1/1", "n1"),
        None,
    ]


def test_spans() -> None:
    said = [span(s) for s in (0.14, 3.25, 12, 59.6, 303, 7500, 100 * 3600)]
    assert said == ["0.14 s", "3.2 s", "12 s", "1 min 00 s", "5 min 03 s", "2 h 05 min", "4 d 04 h"]


def test_a_status_of_another_version_is_read_as_far_as_it_goes() -> None:
    view = RunView.read({"run": "r", "step": "many", "nodes": None, "faults": [3], "new": {}})
    assert (view.run, view.phase, view.step, view.nodes, view.faults) == ("r", "unknown", 0, (), ())
    assert time_of(0).endswith(time.strftime("%M:%S", time.localtime(0)))
