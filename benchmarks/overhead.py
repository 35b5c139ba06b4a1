"""What perdure costs while nothing goes wrong, at most 0.5 % of the ranks' time.

    overhead = hook microseconds a step / microseconds a step
             + CPU-seconds of all perdure processes / CPU-seconds of the ranks

The hook is timed in this process over 100,000 calls. The CPU-seconds are read from /proc while
examples/train_gpt.py runs with its checkpoints, for `--seconds`, beginning after the first steps: the
start is another benchmark's business. Ranks are the processes that make steps, with their children;
everything else that the launcher started is perdure: launcher, warden, agent, zygote, store, uploader.
Wall-clock A/B runs are not used: two equal runs differ by several per cent on a shared machine.
torchrun's agent stands beside it, on the same plain script.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from perdure.benchmarks.common import (
    GPT,
    OBSERVED,
    PLAIN,
    Job,
    Row,
    options,
    perdure,
    report,
    torchrun,
)

CALLS = 100_000
_PLAIN = ("--nproc-per-node", "2", str(OBSERVED), str(PLAIN), "--steps", "100000000")
_GPT = (str(OBSERVED), str(GPT), "--steps", "100000000", "--save-every", "500", "--width", "128")
SAMPLE_S = 0.5  # a process that lives shorter than this may be missed


class Ledger:
    """CPU-seconds of every process of a job since the ledger was opened; the dead keep their last."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._parent: dict[int, int] = {}
        self.sample()
        self._first = dict(self._last)

    def sample(self) -> None:
        for process in self._job.family():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._last[process.pid] = times.user + times.system
                self._parent[process.pid] = process.ppid()

    def split(self, ranks: set[int]) -> tuple[float, float]:
        """CPU-seconds of the ranks with their children, and of all others."""
        inside = outside = 0.0
        for pid, value in self._last.items():
            spent = value - self._first.get(pid, 0.0)
            if self._belongs(pid, ranks):
                inside += spent
            else:
                outside += spent
        return inside, outside

    def _belongs(self, pid: int, ranks: set[int]) -> bool:
        while pid in self._parent:
            if pid in ranks:
                return True
            pid = self._parent[pid]
        return False


def cpu_share(command: list[str], seconds: float) -> tuple[float, float]:
    """Launcher CPU-seconds per CPU-second of the ranks, and seconds a step."""
    with Job([command]) as job:
        if not job.wait_for("20 steps", lambda: len(job.stamps(1)) >= 20, 60):
            raise RuntimeError(f"no 20 steps within 60 s:\n{job.tail()}")
        before = len(job.stamps(0))
        ledger, started = Ledger(job), time.monotonic()
        while (passed := time.monotonic() - started) < seconds:
            time.sleep(SAMPLE_S)
            ledger.sample()
            if job.processes[0].poll() is not None:
                raise RuntimeError(f"the job ended:\n{job.tail()}")
        step_s = passed / (len(job.stamps(0)) - before)
        inside, outside = ledger.split(job.pids(2))
        return outside / inside, step_s


def hook_s(repeats: int = 5) -> list[float]:
    """Seconds that the step hook adds to one call of `optimizer.step()`, with a beat page."""
    from perdure.benchmarks.hook import added_s

    return [added_s(CALLS) for _ in range(repeats)]


def measure(runs: int, seconds: float = 120.0) -> list[Row]:
    hooks = hook_s()
    rows = [Row("step hook", "perdure", "us", [value * 1e6 for value in hooks])]
    peers = {"perdure": perdure("run", *_PLAIN), "torchrun": torchrun(*_PLAIN)}
    for peer, command in peers.items():
        shares = [cpu_share(command, seconds)[0] for _ in range(runs)]
        rows.append(
            Row("launcher CPU by rank CPU, plain script", peer, "%", [100 * s for s in shares])
        )
    totals, steps = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix="perdure-bench-") as store:
            url = ["--store", Path(store).as_uri()]
            share, step_s = cpu_share(perdure("run", "--nproc-per-node", "2", *url, *_GPT), seconds)
        totals.append(100 * (share + statistics.median(hooks) / step_s))
        steps.append(step_s * 1e3)
    note = f"steps of {statistics.median(steps):.1f} ms, a checkpoint every 500"
    rows.append(Row("overhead in all, train_gpt.py", "perdure", "%", totals, note=note))
    return rows


if __name__ == "__main__":
    parser = options("CPU of perdure per CPU of the ranks", 1)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each run (default 120)")
    args = parser.parse_args()
    report(measure(args.runs, args.seconds), as_json=args.json)
