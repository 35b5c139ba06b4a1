"""What is made of a wait status and an error file."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from perdure.runtime import exits

LIBRARY = sysconfig.get_paths()["purelib"] + "/torch/nn/modules/module.py"
TRACE = f'''Traceback (most recent call last):
  File "/job/train.py", line 40, in <module>
    main()
  File "/job/train.py", line 31, in main
    model(x)
  File "{LIBRARY}", line 1500, in _call_impl
    return forward_call(*args, **kwargs)
ValueError: shapes differ
'''


def written(folder: Path, content: object) -> str:
    path = folder / "error.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_an_error_file_gives_words_place_and_traceback(tmp_path: Path) -> None:
    message = {"message": "ValueError: shapes differ", "extraInfo": {"py_callstack": TRACE}}
    path = written(tmp_path, {"message": message})
    report = exits.report(rank=3, node="n", status=1 << 8, by_us=False, error_file=path, oom=False)
    assert (report.exit_code, report.signal, report.rank) == (1, None, 3)
    assert report.error == "ValueError: shapes differ"
    assert report.where == "train.py:31 in main", "the library's frame is not where to look"
    assert report.traceback == TRACE


@pytest.mark.parametrize("content", [{}, [], {"message": {}}, {"message": {"extraInfo": None}}])
def test_a_file_that_is_not_whole_leaves_the_exit_itself(tmp_path: Path, content: object) -> None:
    assert exits.read_error_file(written(tmp_path, content)) == (None, None, None)
    (tmp_path / "error.json").write_text('{"message": {"mess')
    assert exits.read_error_file(str(tmp_path / "error.json")) == (None, None, None)
    assert exits.read_error_file(str(tmp_path / "missing.json")) == (None, None, None)


def test_a_text_alone_is_an_error_without_a_place(tmp_path: Path) -> None:
    assert exits.read_error_file(written(tmp_path, {"message": "out of data"})) == (
        "out of data",
        None,
        None,
    )


@pytest.mark.parametrize(
    ("status", "by_us", "oom", "expected"),
    [
        (0, True, False, (0, None, False, False)),
        (7 << 8, False, False, (7, None, False, False)),
        (9, False, False, (None, 9, False, False)),
        (9, False, True, (None, 9, False, True)),
        (9, True, True, (None, 9, True, False)),
        (15, True, False, (None, 15, True, False)),
    ],
)
def test_status_words(status: int, by_us: bool, oom: bool, expected: tuple[object, ...]) -> None:
    report = exits.report(rank=0, node="n", status=status, by_us=by_us, error_file="/no", oom=oom)
    assert (report.exit_code, report.signal, report.by_us, report.oom) == expected


def test_the_kernel_s_count_of_kills_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 1\noom_kill 1\n")
    monkeypatch.setattr(exits, "_oom_file", lambda: events)
    counter = exits.OomCounter()
    assert not counter.rose()
    events.write_text("low 0\noom 2\noom_kill 2\n")
    assert counter.rose()
    assert not counter.rose()
