"""What the benchmarks share: jobs that leave nothing behind, stamps, rows and their printing.

A benchmark starts each launcher as a user would (a command, its own session), reads the stamps of
benchmarks/observed.py, and ends the job with everything it started: the descendants of the command,
and whatever carries the job's mark in its environment, so that a process cannot get away by losing
its parent. Nothing else is ever killed. Every wait has a bound; a job that does not come in time is
counted as lost, never left out of the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

ROOT = Path(__file__).resolve().parent.parent
OBSERVED = ROOT / "benchmarks" / "observed.py"
PLAIN = ROOT / "examples" / "train_plain.py"
HF = ROOT / "examples" / "train_hf.py"
GPT = ROOT / "examples" / "train_gpt.py"
_MARK = "BENCHMARK_JOB"  # no PERDURE_ or RAY_ prefix: those do not reach the ranks


class Stamp(NamedTuple):
    """One optimizer step, as benchmarks/observed.py saw it."""

    pid: int
    steps: int  # of this process, not of the job
    at_ns: int
    node: str


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: a peer's measurements. `lost` counts the runs that never came back."""

    name: str
    peer: str
    unit: str
    values: Sequence[float]
    lost: int = 0
    note: str = ""

    def to_json(self) -> dict[str, object]:
        known = bool(self.values)
        return {
            "name": self.name,
            "peer": self.peer,
            "value": statistics.median(self.values) if known else None,
            "unit": self.unit,
            "n": len(self.values) + self.lost,
            "min": min(self.values) if known else None,
            "max": max(self.values) if known else None,
            "lost": self.lost,
            "note": self.note,
        }


def perdure(*arguments: str) -> list[str]:
    """The command line of this environment, as a person would call it."""
    return [str(Path(sys.executable).with_name("perdure")), *arguments]


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]


def free_port() -> int:
    """A port nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@dataclass(slots=True)
class Job:
    """Commands that run together (one launcher, or two bare ranks) and their stamps."""

    commands: Sequence[Sequence[str]]
    env: Sequence[dict[str, str]] = ()
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="perdure-bench-")))
    started_ns: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    left_behind: int = 0  # processes still alive after the command had ended, once it is closed

    def __enter__(self) -> Self:
        (self.folder / "stamps").mkdir(exist_ok=True)
        shared = {
            **os.environ,
            _MARK: self.folder.name,
            "STAMPS": str(self.folder / "stamps"),
            "XDG_STATE_HOME": str(self.folder / "state"),  # nothing in the user's own folders
        }
        self.started_ns = time.monotonic_ns()
        for index, command in enumerate(self.commands):
            with (self.folder / f"output{index}").open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**shared, **(self.env[index] if self.env else {})},
                        cwd=self.folder,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        before = self.family()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        before |= self.family()
        self.left_behind = sum(map(alive, before))
        self._kill(before)
        if error is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            error.add_note(f"what the job wrote is in {self.folder}")

    def family(self) -> set[psutil.Process]:
        """Every living process of this job, however it came to be."""
        found = {process for process in psutil.process_iter() if self._marked(process.pid)}
        for root in self.processes:
            with suppress(psutil.NoSuchProcess):
                top = psutil.Process(root.pid)
                found |= {top, *top.children(recursive=True)}
        return {process for process in found if alive(process)}

    def _marked(self, pid: int) -> bool:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False  # gone meanwhile, or somebody else's
        return f"{_MARK}={self.folder.name}".encode() in environ.split(b"\0")

    def _kill(self, processes: set[psutil.Process]) -> None:
        """Raises RuntimeError when one of them lives on."""
        deadline = time.monotonic() + 20
        while processes := {process for process in processes | self.family() if alive(process)}:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            for root in self.processes:
                root.poll()
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes cannot be killed: {processes}")
            time.sleep(0.02)

    def stamps(self, rank: int) -> list[Stamp]:
        """The steps of a rank so far, those of earlier attempts first."""
        path = self.folder / "stamps" / f"rank{rank}"
        if not path.exists():
            return []
        rows = (line.split() for line in path.read_text().splitlines())
        return [Stamp(int(pid), int(steps), int(at), node) for pid, steps, at, node in rows]

    def wait_for(self, what: str, true: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it became true in time. Raises RuntimeError if the job ended before."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if true():
                return True
            if all(process.poll() is not None for process in self.processes):
                if true():
                    return True
                codes = [process.returncode for process in self.processes]
                raise RuntimeError(f"the job ended ({codes}) before {what}:\n{self.tail()}")
            time.sleep(0.005)
        return False

    def pids(self, ranks: int) -> set[int]:
        """Every process that has ever made a step."""
        return {stamp.pid for rank in range(ranks) for stamp in self.stamps(rank)}

    def next_step_ns(self, ranks: int, *, old: set[int], timeout_s: float) -> int | None:
        """When the last rank made its first step in a process that is not `old`; None: never.

        Raises RuntimeError when the job ends instead.
        """

        def firsts() -> list[int]:
            seen = (
                next((stamp.at_ns for stamp in self.stamps(rank) if stamp.pid not in old), None)
                for rank in range(ranks)
            )
            return [at for at in seen if at is not None]

        back = self.wait_for("the next step", lambda: len(firsts()) == ranks, timeout_s)
        return max(firsts()) if back else None

    def tail(self, lines: int = 30) -> str:
        return "\n".join(
            line
            for file in sorted(self.folder.glob("output*"))
            for line in file.read_text(errors="replace").splitlines()[-lines:]
        )


def alive(process: psutil.Process) -> bool:
    """Running, and still the process that it was when it was seen first."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill_rank(stamp: Stamp) -> int:
    """SIGKILLs the process behind a stamp; returns the time of the kill. Raises if it lives on."""
    victim = psutil.Process(stamp.pid)
    at_ns = time.monotonic_ns()
    victim.kill()
    deadline = time.monotonic() + 5
    while alive(victim):
        if time.monotonic() > deadline:
            raise RuntimeError(f"process {stamp.pid} did not die: the fault did not fire")
        time.sleep(0.001)
    return at_ns


def machine() -> dict[str, object]:
    import torch

    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


def table(rows: Iterable[Row]) -> str:
    """Plain text, one line a row, for a person."""
    lines: list[tuple[str, ...]] = [
        ("what", "who", "median", "min", "max", "unit", "runs", "lost", "")
    ]
    for row in rows:
        shown = row.to_json()
        figures = [
            f"{shown[key]:.4g}" if isinstance(shown[key], float | int) else "-"
            for key in ("value", "min", "max")
        ]
        lines.append(
            (row.name, row.peer, *figures, row.unit, str(shown["n"]), str(row.lost), row.note)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def options(text: str, runs: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--runs", type=int, default=runs, help=f"repetitions (default {runs})")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def report(rows: Sequence[Row], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"machine": machine(), "rows": [row.to_json() for row in rows]}))
    else:
        print(table(rows), flush=True)
