"""The JSON form: every event and command survives the journey, and rubbish is refused in words."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.runtime.core import codec
from perdure.runtime.core.commands import Command, LaunchGang
from perdure.runtime.core.events import (
    Attempt,
    Event,
    ExitReport,
    Member,
    RankExited,
    RestorePoint,
)

_numbers = st.integers(0, 10**9)
st.register_type_strategy(Attempt, st.builds(Attempt, _numbers, _numbers))
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))

MESSAGES = [*get_args(Event), *get_args(Command)]


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: str(cls.__name__))
def test_every_message_survives_the_journey(cls: type) -> None:
    @given(st.from_type(cls))
    def journey(message: Event | Command) -> None:
        line = json.loads(json.dumps(codec.to_json(message)))
        is_event = cls in get_args(Event)
        read = codec.event_from_json if is_event else codec.command_from_json
        assert read(line) == message
        assert is_event == ("at" in line)

    journey()


def test_the_form_that_the_journal_and_the_wire_promise() -> None:
    report = ExitReport(rank=3, node="a", at_s=5.0, signal=9)
    event = RankExited(at_s=6.0, attempt=Attempt(2, 7), report=report)
    line = codec.to_json(event)
    assert (line["kind"], line["at"], line["attempt"]) == ("rank_exited", 6.0, "2.7")
    command = LaunchGang(
        attempt=Attempt(1, 1),
        members=(Member("a", 0, 0, 2),),
        restore=RestorePoint(40, Attempt(1, 0)),
        because="start",
    )
    assert codec.to_json(command) == {
        "kind": "launch_gang",
        "attempt": "1.1",
        "members": [["a", 0, 0, 2]],
        "restore": {"step": 40, "attempt": "1.0"},
        "because": "start",
    }


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"kind": "nonsense"}, "unknown kind"),
        ({}, "unknown kind"),
        ({"kind": "tick"}, "'at' is missing"),
        ({"kind": "tick", "at": "now"}, "Tick.at: expected float"),
        ({"kind": "tick", "at": True}, "Tick.at: expected float"),
        ({"kind": "gang_started", "at": 1, "attempt": "2", "node": "a"}, "expected an attempt"),
        ({"kind": "gang_started", "at": 1, "attempt": "-1.2", "node": "a"}, "expected an attempt"),
        ({"kind": "nodes_offered", "at": 1, "nodes": [["a"]]}, "expected 2 items"),
        ({"kind": "nodes_offered", "at": 1, "nodes": {}}, "expected a list"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(line: dict[str, codec.Json], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        codec.event_from_json(line)


def test_keys_of_a_newer_version_are_passed_over() -> None:
    assert codec.event_from_json({"kind": "tick", "at": 1.5, "moon": "full"}).at_s == 1.5
