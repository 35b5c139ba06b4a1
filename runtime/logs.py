"""Where a rank's output goes: always into files, and to the console of a local run as well.

The files are in torchrun's layout, `<log_dir>/<run>/attempt_<n>/<local_rank>/{stdout.log,stderr.log,
error.json}`. An existing folder is evidence and is never touched: a second one of that number gets the
node's name behind it. Ranks write to the files directly (no pipe: a rank never waits for the agent),
and the agent copies to the console what torchrun would show there: a stream that is not redirected, as
it is; a stream that is teed, with its rank before each line. inotify says when there is something to
copy, so a silent rank costs nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
from pathlib import Path

_IN_MODIFY = 0x2
_COPY_BYTES = 1 << 20  # a turn and stream: a loud rank must not hold up the agent's beats
_libc = ctypes.CDLL(None, use_errno=True)

STREAMS = {"stdout.log": 1, "stderr.log": 2}


def make_folder(log_dir: str, run: str, counter: int, local_rank: int, node: str) -> Path:
    parent = Path(log_dir, run, f"attempt_{counter - 1}")
    parent.mkdir(parents=True, exist_ok=True)
    names = [str(local_rank), f"{local_rank}@{node}"]
    names += [f"{local_rank}@{node}.{again}" for again in range(1, 1000)]
    for name in names:
        with contextlib.suppress(FileExistsError):
            folder = parent / name
            folder.mkdir()
            return folder
    raise FileExistsError(f"{parent} holds a thousand folders of rank {local_rank}")


def open_stream(folder: Path, name: str) -> int:
    return os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def streams_of(text: str, local_rank: int) -> int:
    """torchrun's Std syntax for one rank: "3", or "0:1,1:0": bits, 1 stdout and 2 stderr."""
    if re.fullmatch(r"[0-3]", text):
        return int(text)
    chosen = dict(part.split(":", 1) for part in text.split(",") if ":" in part)
    return int(chosen.get(str(local_rank), "0"))


class _Followed:
    def __init__(self, path: Path, target: int, prefix: bytes) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.target = target
        self.prefix = prefix
        self.rest = b""


class Console:
    """Copies what ranks write to the descriptors of a launcher's terminal."""

    def __init__(self, stdout: int, stderr: int) -> None:
        self._targets = {1: stdout, 2: stderr}
        self._inotify = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._inotify < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1: too many in use on this machine?")
        self._followed: dict[int, _Followed] = {}

    def fileno(self) -> int:
        return int(self._inotify)

    def follow(self, folder: Path, local_rank: int, redirects: str, tee: str) -> None:
        redirected, teed = streams_of(redirects, local_rank), streams_of(tee, local_rank)
        for name, bit in STREAMS.items():
            if redirected & bit and not teed & bit:
                continue
            prefix = f"[default{local_rank}]:".encode() if teed & bit else b""
            path = folder / name
            watch = _libc.inotify_add_watch(self._inotify, os.fsencode(path), _IN_MODIFY)
            if watch < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch", str(path))
            self._followed[watch] = _Followed(path, self._targets[bit], prefix)

    def copy(self) -> bool:
        """Copy what is there. True if more may be: call again next turn."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._inotify, 1 << 16):
                pass
        more = [self._copy(followed) for followed in self._followed.values()]
        return any(more)

    def finish(self) -> None:
        """The ranks are gone: show the rest of what they wrote, and stop following."""
        for followed in self._followed.values():
            while self._copy(followed):
                pass
            if followed.rest:
                self._write(followed.target, followed.prefix + followed.rest)
            os.close(followed.fd)
        for watch in self._followed:
            _libc.inotify_rm_watch(self._inotify, watch)
        self._followed.clear()

    def _copy(self, followed: _Followed) -> bool:
        data = os.read(followed.fd, _COPY_BYTES)
        if followed.prefix:
            lines = (followed.rest + data).split(b"\n")
            followed.rest = lines.pop()
            shown = b"".join(followed.prefix + line + b"\n" for line in lines)
        else:
            shown = data
        self._write(followed.target, shown)
        return len(data) == _COPY_BYTES

    def _write(self, target: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(target, view) :]
            except BlockingIOError:  # the launcher's terminal was set non-blocking by somebody
                if not select.select([], [target], [], 1.0)[1]:
                    return  # a console that does not move for a second loses text, not ranks time
            except OSError:
                return  # the terminal is gone: the files have it all
