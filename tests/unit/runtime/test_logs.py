"""Log folders are evidence, and the console shows what torchrun would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perdure.runtime import logs


def test_folders_follow_torchrun_and_none_is_used_twice(tmp_path: Path) -> None:
    made = [logs.make_folder(str(tmp_path), "run", 3, 0, node) for node in ("a", "b", "b")]
    parent = tmp_path / "run" / "attempt_2"
    assert made == [parent / "0", parent / "0@b", parent / "0@b.1"]


@pytest.mark.parametrize(
    ("text", "local_rank", "streams"),
    [("0", 0, 0), ("3", 5, 3), ("0:1,1:2", 0, 1), ("0:1,1:2", 1, 2), ("0:1,1:2", 2, 0)],
)
def test_torchrun_s_syntax(text: str, local_rank: int, streams: int) -> None:
    assert logs.streams_of(text, local_rank) == streams


def shown(tmp_path: Path, redirects: str, tee: str, text: bytes) -> tuple[bytes, bytes]:
    out, err = (os.memfd_create(name) for name in ("out", "err"))
    console = logs.Console(out, err)
    streams = [logs.open_stream(tmp_path, name) for name in logs.STREAMS]
    console.follow(tmp_path, 1, redirects, tee)
    for fd in streams:
        os.write(fd, text)
        os.close(fd)
    console.copy()
    console.finish()
    try:
        return os.pread(out, 99, 0), os.pread(err, 99, 0)
    finally:
        os.close(console.fileno())
        os.close(out)
        os.close(err)


def test_what_is_not_redirected_is_shown_as_it_is(tmp_path: Path) -> None:
    assert shown(tmp_path, "0", "0", b"a\nb") == (b"a\nb", b"a\nb")


def test_what_is_redirected_stays_in_its_file(tmp_path: Path) -> None:
    assert shown(tmp_path, "1", "0", b"a\n") == (b"", b"a\n")


def test_what_is_teed_says_its_rank_on_each_line(tmp_path: Path) -> None:
    assert shown(tmp_path, "3", "3", b"a\nb") == (
        b"[default1]:a\n[default1]:b",
        b"[default1]:a\n[default1]:b",
    )
