"""The example scripts as a user runs them: unmodified, killed, resumed, under other launchers.

The observer of the benchmarks (no word of perdure in it) tells which process made which step, so
that a kill hits a rank that was really training, and its loss can be shown to have happened.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from perdure.benchmarks import soak
from perdure.benchmarks.common import GPT, OBSERVED, Job, kill_rank, perdure, torchrun

pytestmark = pytest.mark.timeout(300)  # generous: a busy machine is no failure

STEPS, BATCH = 60, 8
TRAIN = [str(GPT), "--steps", str(STEPS), "--batch", str(BATCH), "--save-every", "5"]


@dataclass(frozen=True)
class Line:
    step: int
    loss: str  # hexadecimal: equal means bit by bit
    samples: tuple[int, ...]
    attempt: str


def read(log: Path) -> list[Line]:
    rows = map(json.loads, log.read_text().splitlines())
    return [Line(r["step"], r["loss"], tuple(r["samples"]), r["attempt"]) for r in rows]


def surviving(lines: list[Line]) -> list[Line]:
    """Each step as it was made last: what a rollback undid is not part of the run."""
    return list({line.step: line for line in lines}.values())


def finish(job: Job, timeout_s: float = 100) -> None:
    (launcher,) = job.processes
    try:
        code = launcher.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not finished within {timeout_s} s:\n{job.tail()}")
    assert code == 0, job.tail(100)


def unbroken_run(folder: Path, *options: str) -> list[Line]:
    """The run that nobody touches, two ranks."""
    log = folder / "log"
    command = perdure("run", "--nproc-per-node", "2", "--store", folder.as_uri(), *TRAIN, *options)
    with Job([[*command, "--losses", str(log)]]) as job:
        finish(job)
    lines = read(log)
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    assert float.fromhex(lines[-1].loss) < float.fromhex(lines[0].loss)
    return lines


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    return unbroken_run(tmp_path_factory.mktemp("unbroken"))


@pytest.fixture(scope="module")
def unbroken_sharded(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    return unbroken_run(tmp_path_factory.mktemp("unbroken-sharded"), "--fsdp")


@pytest.mark.parametrize("how", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_a_run_with_two_kills_equals_the_unbroken_run(
    tmp_path: Path, how: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    unbroken: list[Line] = request.getfixturevalue("unbroken_sharded" if how else "unbroken")
    log = tmp_path / "log"
    options = ["--nproc-per-node", "2", "--store", tmp_path.as_uri()]
    chance = random.Random(7)
    script = [str(OBSERVED), *TRAIN, *how, "--losses", str(log)]
    with Job([perdure("run", *options, *script)]) as job:
        for step in (chance.randint(8, 14), chance.randint(20, 28)):

            def reached(step: int = step) -> bool:
                """By the log: stamps count the steps of one process. And there is a way back."""
                lines = read(log) if log.exists() else []
                committed = any(tmp_path.glob("*/checkpoints/commits/*.json"))
                return committed and bool(lines) and lines[-1].step >= step

            assert job.wait_for(f"step {step} and a commit", reached, 60), job.tail()
            old = job.pids(2)
            kill_rank(job.stamps(chance.randrange(2))[-1])
            assert job.next_step_ns(2, old=old, timeout_s=60) is not None, job.tail()
        finish(job)
    assert job.left_behind == 0
    lines = read(log)
    attempts = list(dict.fromkeys(line.attempt for line in lines))
    assert len(attempts) == 3, "two kills make three attempts"
    for attempt in attempts[1:]:
        first = next(line.step for line in lines if line.attempt == attempt)
        assert first > 1 and first % 5 == 1, f"{attempt} went on from no checkpoint: step {first}"
    right = {u.step: u.loss for u in unbroken}
    wrong = [line for line in lines if line.loss != right[line.step]]
    assert not wrong, f"not bit by bit, what a rollback undid included: {wrong}"
    kept = surviving(lines)
    assert [(line.step, line.loss) for line in kept] == [(u.step, u.loss) for u in unbroken]
    seen = [sample for line in kept for sample in line.samples]
    assert len(seen) == len(set(seen)) == STEPS * BATCH, "each sample once along the surviving line"


def test_the_same_script_under_torchrun_and_plain_python(
    tmp_path: Path, unbroken: list[Line]
) -> None:
    """No agent anywhere: the losses are those of `perdure run`, and the checkpoints are found."""
    log = tmp_path / "log"
    script = [*TRAIN, "--losses", str(log), "--store", (tmp_path / "run").as_uri()]
    with Job([torchrun("--nproc-per-node", "2", *script)]) as job:
        finish(job)
    assert [line.loss for line in read(log)] == [line.loss for line in unbroken]
    log.unlink()
    longer = [*script, "--steps", str(STEPS + 5)]
    with Job([[sys.executable, *longer]]) as job:  # one process goes on where two had stopped
        finish(job)
    assert [line.step for line in read(log)] == list(range(STEPS + 1, STEPS + 6))


@pytest.mark.parametrize("seed", range(5))
def test_unmodified_scripts_come_back(seed: int) -> None:
    """Five of the hundred of benchmarks/soak.py; NotBack says what broke."""
    assert soak.one_run(("plain", "trainer")[seed % 2], seed) > 0


def test_the_launcher_of_a_whole_job_imports_nothing_heavy(tmp_path: Path) -> None:
    script = tmp_path / "noop.py"
    script.write_text("print('here')\n")
    command = perdure("run", "--store", tmp_path.as_uri(), str(script))
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "here" in result.stdout
    loaded = {
        name.split(".")[0] for name in re.findall(r"\|\s*([\w.]+)$", result.stderr, re.MULTILINE)
    }
    assert "perdure" in loaded, "-X importtime told nothing"
    assert not loaded & {"torch", "ray", "rich", "numpy", "obstore", "fsspec", "s3fs"}
