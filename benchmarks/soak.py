"""Kill after kill, on scripts that know nothing of perdure: does every single run come back?

Each run starts a job, SIGKILLs one rank at a random step, and demands that all ranks step again,
that the job then ends by itself with exit code 0, and that no process is left. Half of the runs are
a plain DDP script, half a Hugging Face Trainer script; both resume from their own checkpoints.
"""

from __future__ import annotations

import random
import sys
import time

from perdure.benchmarks.common import (
    HF,
    OBSERVED,
    PLAIN,
    Job,
    Row,
    kill_rank,
    options,
    perdure,
    report,
)

STEPS = {"plain": 600, "trainer": 200}
STEP_S, END_S, LEFT_S = 60.0, 90.0, 2.0


class NotBack(RuntimeError):
    """A run that broke the promise; the message says how, and shows the job's last output."""


def one_run(kind: str, seed: int, launcher: list[str] | None = None) -> float:
    """Seconds from the kill to the next step of every rank. Raises NotBack."""
    chance = random.Random(seed)
    total = STEPS[kind]
    at_step, victim = chance.randint(2, total // 2), chance.randrange(2)
    script = (
        [str(PLAIN), "--checkpoint", "plain.pt"]
        if kind == "plain"
        else [str(HF), "--output", "hf-out"]
    )
    command = launcher or perdure("run", "--nproc-per-node", "2", "--max-restarts", "3")
    with Job([[*command, str(OBSERVED), *script, "--steps", str(total)]]) as job:
        if not job.wait_for(f"step {at_step}", lambda: len(job.stamps(victim)) >= at_step, STEP_S):
            raise NotBack(f"{kind} {seed}: no step {at_step} within {STEP_S} s:\n{job.tail()}")
        old = job.pids(2)
        killed_ns = kill_rank(job.stamps(victim)[-1])
        which = f"{kind} {seed}, killed at {at_step}"
        try:
            at_ns = job.next_step_ns(2, old=old, timeout_s=STEP_S)
        except RuntimeError as error:
            raise NotBack(f"{which}: {error}") from error
        if at_ns is None:
            raise NotBack(f"{which}: not back:\n{job.tail()}")
        _ends_well(job, which)
        return (at_ns - killed_ns) / 1e9


def _ends_well(job: Job, which: str) -> None:
    """The launcher ends by itself, with 0, and nothing it started outlives it."""
    (launcher,) = job.processes
    deadline = time.monotonic() + END_S
    while launcher.poll() is None:
        if time.monotonic() > deadline:
            raise NotBack(f"{which}: not finished after {END_S} s:\n{job.tail()}")
        time.sleep(0.02)
    if launcher.returncode != 0:
        raise NotBack(f"{which}: exit code {launcher.returncode}:\n{job.tail()}")
    deadline = time.monotonic() + LEFT_S
    while left := job.family():
        if time.monotonic() > deadline:
            raise NotBack(f"{which}: left behind: {left}")
        time.sleep(0.02)


def measure(runs: int) -> list[Row]:
    times: dict[str, list[float]] = {kind: [] for kind in STEPS}
    lost = dict.fromkeys(STEPS, 0)
    for seed in range(runs):
        kind = ("plain", "trainer")[seed % 2]
        try:
            times[kind].append(one_run(kind, seed))
        except NotBack as problem:
            lost[kind] += 1
            print(f"NOT BACK: {problem}", file=sys.stderr, flush=True)
    return [
        Row(f"{kind} script, rank killed to the next step", "perdure", "s", values, lost[kind])
        for kind, values in times.items()
    ]


if __name__ == "__main__":
    args = options("kill a rank in each of many jobs; all must come back", 100).parse_args()
    rows = measure(args.runs)
    report(rows, as_json=args.json)
    sys.exit(1 if any(row.lost for row in rows) else 0)
