"""The live rows on a real (pseudo) terminal: what is sent to it, byte by byte."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from perdure.launchers.screen import ROWS, Screen
from perdure.launchers.view import Json

RUNNING: Json = {"run": "r-1", "phase": "running", "step": 7, "world_size": 2, "nodes": ["n0"]}


@dataclass
class Terminal:
    ours: int
    theirs: int

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def sent(self) -> str:
        """What was written since the last look; a write to a pty is there when it returns."""
        data = b""
        while select.select([self.ours], [], [], 0)[0]:
            data += os.read(self.ours, 65536)
        return data.decode()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(*os.openpty())
    made.resize(80, 24)
    yield made
    os.close(made.ours)
    os.close(made.theirs)


def plain(text: str) -> str:
    return re.sub(r"\x1b(\[[0-9;]*[A-Za-z]|[78DM])", "", text)


def test_the_foot_is_reserved_once_and_given_back(terminal: Terminal) -> None:
    screen = Screen(terminal.theirs)
    screen.turn(RUNNING, [{"kind": "note", "text": "x"}])
    first = terminal.sent()
    assert f"\x1b[1;{24 - ROWS}r" in first, "only the upper part scrolls"
    assert "step 7" in plain(first)
    screen.turn({**RUNNING, "step": 8}, [{"kind": "note", "text": "y"}])
    second = terminal.sent()
    assert "r\x1b8" not in second, "the region is set once"
    assert "step 8" in plain(second)
    screen.end({**RUNNING, "phase": "finished", "exit_code": 0})
    last = terminal.sent()
    assert "\x1b[r" in last, "the whole terminal scrolls again"
    assert "run r-1 finished" in plain(last)


def test_each_picture_leaves_the_cursor_where_it_was(terminal: Terminal) -> None:
    screen = Screen(terminal.theirs)
    screen.turn(RUNNING, [{"kind": "note", "text": "x"}])
    terminal.sent()
    screen.turn({**RUNNING, "step": 9}, [{"kind": "gang_started", "node": "n0"}])
    picture = terminal.sent()
    assert picture.startswith("\x1b7")
    assert picture.endswith("\x1b8")
    assert "\n" not in picture, "a line feed at the foot would scroll"


def test_a_fault_is_told_above(terminal: Terminal) -> None:
    screen = Screen(terminal.theirs)
    fault = {
        "at": 5.0,
        "kind": "k",
        "blame": "user",
        "rank": 1,
        "node": "n0",
        "because": "it broke",
    }
    screen.turn({**RUNNING, "faults": [fault]}, [])
    text = terminal.sent()
    assert "fault: it broke [blame: the script]" in plain(text)
    assert "\x1b[31m" in text


def test_a_terminal_that_changes_its_size(terminal: Terminal) -> None:
    screen = Screen(terminal.theirs)
    screen.turn(RUNNING, [{"kind": "note", "text": "x"}])
    terminal.resize(120, 40)
    terminal.sent()
    screen.turn(RUNNING, [{"kind": "note", "text": "y"}])
    assert f"\x1b[1;{40 - ROWS}r" in terminal.sent()


def test_a_terminal_too_small_to_share(terminal: Terminal) -> None:
    terminal.resize(80, 4)
    screen = Screen(terminal.theirs)
    screen.turn(RUNNING, [{"kind": "note", "at": 0.0, "text": "still told"}])
    text = terminal.sent()
    assert "still told" in text
    assert "\x1b[1;" not in text
    screen.end({**RUNNING, "phase": "finished", "exit_code": 0})
    assert "\x1b[r" not in terminal.sent()
