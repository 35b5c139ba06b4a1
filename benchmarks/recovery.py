"""A rank is SIGKILLed at a random step: how long until every rank has made a step again?

Measured from the kill, by the stamps of an observer that no launcher knows of, on an unmodified
DDP script. torchrun runs beside it, in turns. A run that is not back after the patience is counted
as lost (torchrun hangs for ever now and then: the ranks of its new attempt meet the old store).
"""

from __future__ import annotations

import random
import sys

from perdure.benchmarks.common import (
    OBSERVED,
    PLAIN,
    Job,
    Row,
    kill_rank,
    options,
    perdure,
    report,
    torchrun,
)

PATIENCE_S = 25.0
_SHARED = ("--nproc-per-node", "2", "--max-restarts", "3", str(OBSERVED), str(PLAIN))
PEERS = {
    "perdure": perdure("run", *_SHARED, "--steps", "1000000"),
    "torchrun": torchrun(*_SHARED, "--steps", "1000000"),
}


def kill_to_next_step(command: list[str], seed: int) -> float | None:
    """Seconds from the kill to the first step of the last rank; None when it never came."""
    chance = random.Random(seed)
    at_step, victim = chance.randint(5, 500), chance.randrange(2)
    with Job([command]) as job:

        def reached() -> bool:
            return all(len(job.stamps(rank)) >= at_step for rank in range(2))

        if not job.wait_for(f"step {at_step}", reached, 60):
            raise RuntimeError(f"no step {at_step} within 60 s:\n{job.tail()}")
        old = job.pids(2)
        killed_ns = kill_rank(job.stamps(victim)[-1])
        try:
            at_ns = job.next_step_ns(2, old=old, timeout_s=PATIENCE_S)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return None
        return None if at_ns is None else (at_ns - killed_ns) / 1e9


def measure(runs: int) -> list[Row]:
    times: dict[str, list[float | None]] = {peer: [] for peer in PEERS}
    for seed in range(runs):
        for peer, command in PEERS.items():
            times[peer].append(kill_to_next_step(command, seed))
    return [
        Row(
            "rank killed to the next step",
            peer,
            "s",
            [value for value in values if value is not None],
            lost=values.count(None),
        )
        for peer, values in times.items()
    ]


if __name__ == "__main__":
    args = options("kill a rank, time the next step", 10).parse_args()
    report(measure(args.runs), as_json=args.json)
