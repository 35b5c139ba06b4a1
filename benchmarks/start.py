"""From the start of the launcher to the first step of both ranks, cold, with every default on.

The measure is two bare processes that meet by env:// and have no launcher at all: what torch itself
needs. They, torchrun and perdure take turns, so that a busy minute of the machine hits all three.
"""

from __future__ import annotations

import statistics
import sys

from perdure.benchmarks.common import (
    OBSERVED,
    PLAIN,
    Job,
    Row,
    free_port,
    options,
    perdure,
    report,
    torchrun,
)

SCRIPT = (str(OBSERVED), str(PLAIN), "--steps", "1000000")


def bare() -> Job:
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # as torchrun and perdure set it for more than one rank on a node
    shared["OMP_NUM_THREADS"] = "1"
    env = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return Job([[sys.executable, *SCRIPT]] * 2, env)


def starters() -> dict[str, Job]:
    return {
        "perdure": Job([perdure("run", "--nproc-per-node", "2", *SCRIPT)]),
        "bare processes": bare(),
        "torchrun": Job([torchrun("--nproc-per-node", "2", *SCRIPT)]),
    }


def start_to_first_step(job: Job) -> float:
    """Seconds. Raises RuntimeError when there is no step within a minute."""
    with job:
        at_ns = job.next_step_ns(2, old=set(), timeout_s=60)
        if at_ns is None:
            raise RuntimeError(f"no first step within 60 s:\n{job.tail()}")
        return (at_ns - job.started_ns) / 1e9


def measure(runs: int) -> list[Row]:
    times: dict[str, list[float]] = {peer: [] for peer in starters()}
    for turn in range(runs + 1):
        for peer, job in starters().items():
            taken = start_to_first_step(job)
            if turn:  # the first turn warms the page cache for all three
                times[peer].append(taken)
    rows = [Row("start to the first step", peer, "s", values) for peer, values in times.items()]
    ratios = [a / b for a, b in zip(times["perdure"], times["bare processes"], strict=True)]
    note = f"of medians: {_ratio(times):.2f}"
    return [*rows, Row("start, by bare processes", "perdure", "times", ratios, note=note)]


def _ratio(times: dict[str, list[float]]) -> float:
    return statistics.median(times["perdure"]) / statistics.median(times["bare processes"])


if __name__ == "__main__":
    args = options("time the launcher to the first step", 7).parse_args()
    report(measure(args.runs), as_json=args.json)
