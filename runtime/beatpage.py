"""One page of shared memory per rank: how far it is, and what it is told, without a message.

The agent makes the page (a memfd: no name, nothing to leak), the rank inherits the descriptor, both
map it. Every word is 8 aligned bytes with one writer, so a read is never torn and no lock is needed;
a rank that is stuck in a collective, stopped or dying still shows its last step. Times are
CLOCK_MONOTONIC nanoseconds, which all processes of a machine share.

A second descriptor, an eventfd, is written once at the first step of an attempt: the agent hears of
it without looking at the page a hundred times a second.

It must never block a rank, and writing a step must cost about a microsecond: it is on the path of
every optimizer step of every script.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import time
from dataclasses import dataclass

SIZE_BYTES = 4096
MAGIC = 0x7065726475726501  # "perdure", layout version 1
BEAT_FD_VARIABLE = "PERDURE_BEAT_FD"
WAKE_FD_VARIABLE = "PERDURE_WAKE_FD"

STEP, STEP_AT, PHASE, LOSS, TOTAL, USES_DUE, ALIVE_AT = 1, 2, 3, 4, 5, 6, 7  # the rank writes
FENCE, SAVE_AT, STOP_ASKED = 16, 17, 18  # the agent writes

PHASES = ("start", "restore", "train", "save", "eval", "compile", "other", "done")
START, RESTORE, TRAIN, SAVE, EVAL, COMPILE, OTHER, DONE = range(8)


@dataclass(frozen=True, slots=True)
class RankView:
    """What a page says at one moment. `age_s`: seconds since the last sign of life."""

    step: int
    phase: str
    age_s: float
    loss: float | None
    total: int | None
    uses_due: bool

    def to_json(self) -> dict[str, object]:
        return {
            "step": self.step,
            "phase": self.phase,
            "age_s": round(self.age_s, 3),
            "loss": self.loss,
            "total": self.total,
            "uses_due": self.uses_due,
        }


class BeatPage:
    """A mapping of one page; `words` is public because the step hook writes it in line."""

    counted_by_script = False  # the script names its steps itself: the hook no longer does

    def __init__(self, fd: int) -> None:
        """Map the page behind `fd`, which stays open and the caller's.

        Raises ValueError if it is no beat page of this layout.
        """
        self._map = mmap.mmap(fd, SIZE_BYTES)
        self.words = memoryview(self._map).cast("q")
        if self.words[0] != MAGIC:
            found = self.words[0]
            self.close()
            raise ValueError(f"no beat page of this version: its first word is {found:#x}")

    def close(self) -> None:
        self.words.release()
        self._map.close()

    @property
    def step(self) -> int:
        return int(self.words[STEP])

    def read(self, now_ns: int | None = None) -> RankView:
        now = time.monotonic_ns() if now_ns is None else now_ns
        words = self.words
        loss = struct.unpack("d", struct.pack("q", words[LOSS]))[0]
        phase = words[PHASE]
        return RankView(
            step=words[STEP],
            phase=PHASES[phase] if 0 <= phase < len(PHASES) else "other",
            age_s=max(0.0, (now - words[ALIVE_AT]) / 1e9),
            loss=None if math.isnan(loss) else loss,
            total=words[TOTAL] or None,
            uses_due=bool(words[USES_DUE]),
        )

    def write_step(self, step: int) -> None:
        now = time.monotonic_ns()
        words = self.words
        words[STEP_AT] = now
        words[ALIVE_AT] = now
        words[STEP] = step

    def write_phase(self, phase: int) -> None:
        self.words[PHASE] = phase
        self.words[ALIVE_AT] = time.monotonic_ns()

    def write_loss(self, loss: float) -> None:
        self.words[LOSS] = struct.unpack("q", struct.pack("d", loss))[0]

    def fenced(self, now_ns: int) -> bool:
        """Whether this rank has lost the right to take another step."""
        fence: int = self.words[FENCE]
        return fence != 0 and now_ns >= fence


#: This rank's own page, and the eventfd of its first step: set once, by the worker or the session.
mine: BeatPage | None = None
wake_fd: int | None = None


def wake_agent() -> None:
    """Say that the first step was made. Once: later steps are read off the page."""
    global wake_fd
    if wake_fd is not None:
        with contextlib.suppress(OSError):  # a script that closes all descriptors has closed it
            os.eventfd_write(wake_fd, 1)
        wake_fd = None


def create() -> int:
    """A new page, in phase "start" and alive now. Returns its descriptor, not inheritable."""
    fd = os.memfd_create("perdure-beat", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE_BYTES)
    words = [0] * 32
    words[0] = MAGIC
    words[LOSS] = struct.unpack("q", struct.pack("d", math.nan))[0]
    words[ALIVE_AT] = time.monotonic_ns()
    os.pwrite(fd, struct.pack("32q", *words), 0)
    return fd


def from_environment() -> BeatPage | None:
    """The page of this rank, or None where no agent gave one (torchrun, plain python).

    A child that the script started inherits the variable but not the descriptor: whatever has that
    number there is no beat page, which the first word tells.
    """
    number = os.environ.get(BEAT_FD_VARIABLE, "")
    if not number.isdecimal():
        return None
    try:
        return BeatPage(int(number))
    except (OSError, ValueError):
        return None
