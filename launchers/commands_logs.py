"""logs: what the ranks of the newest attempt printed, from their files.

The files lie on the nodes, in torchrun's layout: `<log_dir>/<run>/attempt_<n>/<local rank>/` with
stdout.log and stderr.log. Which rank sat where is in the journal. Files of other machines are named,
not fetched. Several ranks are told apart by a prefix, one rank is shown as it is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from perdure.launchers.commands_ask import tale_of
from perdure.launchers.options import Given
from perdure.launchers.runs import Found, find, open_run, read_spec
from perdure.launchers.words import Launch
from perdure.runtime.errors import RunProblem, UsageError

POLL_S = 0.2
CHUNK = 1 << 20


@dataclass(slots=True)
class Tail:
    """One file, read on as it grows; gives whole lines."""

    path: str
    prefix: bytes
    file: BinaryIO | None = None
    rest: bytes = b""

    def lines(self) -> Iterator[bytes]:
        if self.file is None:
            if not os.path.exists(self.path):
                return
            self.file = open(self.path, "rb")  # noqa: SIM115 - kept open: it is followed
        while data := self.file.read(CHUNK):
            *whole, self.rest = (self.rest + data).split(b"\n")
            yield from (self.prefix + line + b"\n" for line in whole)

    def last(self) -> bytes:
        """What a killed rank wrote without ending its line."""
        return self.prefix + self.rest + b"\n" if self.rest else b""


@dataclass(slots=True)
class Place:
    rank: int
    folder: str
    tails: list[Tail] = field(default_factory=list)


def logs(given: Given) -> int:
    found = find(given.target)
    wanted = _wanted(given)
    attempt, places = _places(found, wanted)
    if not any(os.path.isdir(place.folder) for place in places):
        raise RunProblem(
            f"no log files of {found.run} on this machine: {places[0].folder} is not here",
            hint="they lie on the nodes that ran the ranks: "
            + ", ".join(node for node, _, _ in attempt.members),
        )
    for place in places:
        prefix = b"" if len(places) == 1 else f"[rank {place.rank}] ".encode()
        place.tails = [
            Tail(os.path.join(place.folder, name), prefix) for name in ("stdout.log", "stderr.log")
        ]
    _pump(found, attempt, places, follow=given.flag("follow"))
    return 0


def _wanted(given: Given) -> list[int]:
    ranks = [text for item in given.texts("rank") for text in item.split(",")]
    if wrong := [text for text in ranks if not text.isdigit()]:
        raise UsageError(f"--rank {wrong[0]!r} is not a rank", hint="a number from 0")
    return [int(text) for text in ranks]


def _places(found: Found, wanted: list[int]) -> tuple[Launch, list[Place]]:
    spec = read_spec(open_run(found))
    tale, _ = tale_of(found)
    if not tale.launches:
        raise RunProblem(
            f"run {found.run} has started no rank yet, so there are no logs",
            hint=f"see `perdure status {found.run}`",
        )
    newest = tale.launches[-1]
    all_ranks = [first + i for _, first, nproc in newest.members for i in range(nproc)]
    if unknown := sorted(set(wanted) - set(all_ranks)):
        raise UsageError(
            f"run {found.run} has no rank {unknown[0]}: it has {len(all_ranks)}",
            hint=f"0 to {len(all_ranks) - 1}",
        )
    base = found.record.log_dir if found.record is not None else None
    root = os.path.join(base or spec.log_dir or "", found.run)
    return newest, [Place(rank, _folder(root, newest, rank)) for rank in wanted or all_ranks]


def _folder(root: str, launch: Launch, rank: int) -> str:
    """Nodes that share a log folder tell their ranks apart by `<local rank>@<node>`."""
    place = launch.log_of(rank)
    assert place is not None, "only ranks of this launch are asked for"
    shared = os.path.join(root, f"{place[0]}@{place[1]}")
    return shared if os.path.isdir(shared) else os.path.join(root, place[0])


def _pump(found: Found, attempt: Launch, places: list[Place], *, follow: bool) -> None:
    out = sys.stdout.buffer
    checked_at_s = time.monotonic()
    ended = not follow
    while True:
        moved = False
        for tail in (tail for place in places for tail in place.tails):
            for line in tail.lines():
                moved = True
                out.write(line)
        out.flush()
        if ended and not moved:
            break
        if not moved:
            time.sleep(POLL_S)
            if time.monotonic() - checked_at_s > 2.0:
                checked_at_s = time.monotonic()
                # a newer attempt writes elsewhere: end here, and say so
                tale, _ = tale_of(found)
                newer = bool(tale.launches) and tale.launches[-1].attempt != attempt.attempt
                ended = tale.finished is not None or newer
                if newer:
                    note = f"attempt {attempt.attempt} has ended; a newer one runs"
                    print(f"perdure: {note}", file=sys.stderr)
    for tail in (tail for place in places for tail in place.tails):
        out.write(tail.last())
    out.flush()
