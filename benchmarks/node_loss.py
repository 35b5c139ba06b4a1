"""Every process of a node is SIGKILLed while a spare stands by: how long until the next step?

On a Ray cluster of three nodes on this machine, begun for each run: two for the ranks, one spare. A
node dies with all that ran on it: raylet, agent, ranks. Never the head: it is Ray's own single point.
Ray Train runs the same model beside it; Ray notices a dead node after about 15 s.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from perdure.benchmarks.common import OBSERVED, PLAIN, ROOT, Job, Row, options, perdure, report
from perdure.launchers.ray_nodes import LocalRay

PATIENCE_S = 90.0
PEER = ROOT / "benchmarks" / "ray_train_peer.py"


def commands(address: str, folder: Path) -> dict[str, list[str]]:
    ours = [
        *("--cluster", address, "--store", folder.as_uri(), "--code", "none"),
        *("--nnodes", "2", "--nproc-per-node", "1", "--spares", "1"),
        *("--env", f"STAMPS={folder / 'stamps'}"),
    ]
    return {
        "perdure": perdure("run", *ours, str(OBSERVED), str(PLAIN), "--steps", "1000000"),
        "Ray Train": [sys.executable, str(PEER), address, str(folder / "stamps")],
    }


def kill_to_next_step(peer: str, seed: int) -> float | None:
    """Seconds from the kill of a node to a step of both new ranks; None when it never came."""
    chance = random.Random(seed)
    with LocalRay(nodes=3, cpus=1) as ray:
        job = Job([])
        job.commands = [commands(ray.address, job.folder)[peer]]
        with job:
            at_step = chance.randint(20, 200)
            enough = job.wait_for(
                f"step {at_step}",
                lambda: all(len(job.stamps(rank)) >= at_step for rank in range(2)),
                120,
            )
            if not enough:
                raise RuntimeError(f"no step {at_step} within 120 s:\n{job.tail()}")
            used = sorted({job.stamps(rank)[-1].node.split("/")[1] for rank in range(2)})
            if len(used) != 2:
                raise RuntimeError(f"the two ranks share a node: {used}")
            victim = chance.choice([name for name in used if name != ray.names[0]])
            old, killed_ns = job.pids(2), time.monotonic_ns()
            if ray.kill_node(victim) < 2:  # the raylet and a rank at least
                raise RuntimeError(f"{victim} had no processes: the fault did not fire")
            try:
                at_ns = job.next_step_ns(2, old=old, timeout_s=PATIENCE_S)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return None
            return None if at_ns is None else (at_ns - killed_ns) / 1e9


def measure(runs: int) -> list[Row]:
    times: dict[str, list[float | None]] = {"perdure": []}
    try:
        import ray.train  # noqa: F401
    except ImportError as error:
        print(f"without its peer: {error}", file=sys.stderr)
    else:
        times["Ray Train"] = []
    for seed in range(runs):
        for peer, values in times.items():
            values.append(kill_to_next_step(peer, seed))
    return [
        Row(
            "node killed to the next step, spare present",
            peer,
            "s",
            [value for value in values if value is not None],
            lost=values.count(None),
        )
        for peer, values in times.items()
    ]


if __name__ == "__main__":
    args = options("kill a whole node, time the next step", 5).parse_args()
    report(measure(args.runs), as_json=args.json)
