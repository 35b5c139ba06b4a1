"""A Checkpointer without an agent: its own uploader, ranks that agree through the store."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.checkpoint.api import Checkpointer
from perdure.checkpoint.errors import StoreError
from perdure.checkpoint.lineage import read_history
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.store import open_store

WAIT_S = 60.0


def steps(url: str, options: dict[str, str] | None = None) -> list[int]:
    return sorted(commit.step for commit in read_history(open_store(url, options)).commits)


def flip_last_bit(root: Path, step: int) -> None:
    (shard,) = root.glob(f"checkpoints/objects/step-{step:012d}/*/w0.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(data)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def python(text: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A rank of its own, torchrun's way: a process that knows its place from the environment."""
    return subprocess.Popen(
        [sys.executable, "-c", text],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    return out


DYING = """
import os, signal, torch
from perdure.checkpoint.api import Checkpointer
made = Checkpointer({url!r}, rank=0, world_size=1)
made.restore({{"w": torch.zeros(4_000_000)}})
made.save(7, {{"w": torch.ones(4_000_000)}})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_without_an_agent_too_and_the_uploader_then_leaves(url: str) -> None:
    rank = python(DYING.format(url=url))
    rank.communicate(timeout=WAIT_S)  # also waits for the uploader, which holds its stderr
    assert rank.returncode == -signal.SIGKILL
    assert steps(url) == [7]


@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_a_checkpointer_of_its_own_saves_and_restores_bit_by_bit(
    kind: str, url: str, s3: Any
) -> None:
    options = None
    if kind == "s3":
        url, options = f"{s3.bucket()}/run", s3.options
    elif kind == "memory":
        url = "memory://run"
    state = {"w": torch.randn(300_000), "n": 1}
    first = Checkpointer(url, storage_options=options, rank=0, world_size=1)
    assert first.restore(state) is None
    first.save(1, state).wait(WAIT_S)
    second = first
    if kind != "memory":  # which lives in the uploader's process
        first.close()
        second = Checkpointer(url, storage_options=options, rank=0, world_size=1)
        found: dict[str, Any] = {"w": torch.zeros(300_000), "n": 0}
        restored = second.restore(found)
        assert restored is not None
        assert (restored.step, found["n"]) == (1, 1)
        assert torch.equal(found["w"], state["w"])
    second.save(2, state).wait(WAIT_S)
    second.close()


def test_alone_a_process_falls_back_to_the_older_checkpoint_by_itself(
    url: str, tmp_path: Path
) -> None:
    made = Checkpointer(url, rank=0, world_size=1)
    for step in (1, 2):
        made.save(step, {"w": torch.full((100_000,), float(step))}).wait(WAIT_S)
    made.close()
    flip_last_bit(tmp_path / "store", 2)
    again = Checkpointer(url, rank=0, world_size=1)
    state = {"w": torch.zeros(100_000)}
    restored = again.restore(state)
    assert restored is not None
    assert restored.step == 1
    assert state["w"].eq(1).all()
    again.save(2, state).wait(WAIT_S)  # the new attempt's step 2 is another one
    again.close()
    history = read_history(open_store(url))
    assert [mark.point for mark in history.bad] == [Point(2, "1.1")]


GANG = """
import json, os, sys, time, torch
from perdure.checkpoint.api import Checkpointer
from perdure.checkpoint.errors import IntegrityError
rank, folder = int(os.environ["RANK"]), {folder!r}
made = Checkpointer({url!r})
state = {{"w": torch.zeros(100_000), "v": torch.zeros(100_000), "rng": {{f"rank{{rank}}": rank}}}}
try:
    restored = made.restore(state)
except IntegrityError as error:
    print(json.dumps(["bad", error.hint]), flush=True)
    # A launcher ends all ranks now. Here rank 0 must not be gone before rank 1 has asked it.
    open(f"{{folder}}/bad{{rank}}", "w").close()
    deadline = time.monotonic() + {wait}
    while not all(os.path.exists(f"{{folder}}/bad{{r}}") for r in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    sys.exit(0)
start = restored.step if restored else 0
values = [state["w"].unique().tolist(), state["v"].unique().tolist()]
for tensor in (state["w"], state["v"]):
    tensor.fill_(start + 1.0)
made.save(start + 1, state).wait({wait})
made.close()
print(json.dumps([start, *values]))
"""


def gang(url: str, folder: Path, restarts: int, ranks: int = 2) -> list[Any]:
    """All ranks of a torchrun launch with a fixed port: each launch is told the same."""
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "WORLD_SIZE": str(ranks),
    }
    script = GANG.format(url=url, folder=str(folder), wait=WAIT_S)
    started = [python(script, told | {"RANK": str(rank)}) for rank in range(ranks)]
    return [json.loads(output(process)) for process in started]


def test_ranks_without_an_agent_agree_through_the_store_and_give_up_a_bad_checkpoint_together(
    url: str, tmp_path: Path
) -> None:
    assert gang(url, tmp_path, 0) == [[0, [0], [0]]] * 2
    assert (
        gang(url, tmp_path, 0) == [[1, [1], [1]]] * 2
    )  # the very same launch again: no stale answer
    assert steps(url) == [1, 2]
    flip_last_bit(tmp_path / "store", 2)
    for kind, hint in gang(url, tmp_path, 0):
        assert kind == "bad"
        assert "Restart the job" in hint
    assert gang(url, tmp_path, 1) == [[1, [1], [1]]] * 2
    assert steps(url) == [1, 2, 2]


LOADER = """
import torch
from torch.utils.data import DataLoader
from perdure.checkpoint.api import Checkpointer
made = Checkpointer({url!r}, rank=0, world_size=1)
state = {{"w": torch.ones(1_000_000)}}
made.prepare(state)
made.save(1, state)
for step in (2, 3):
    loader = DataLoader(range(64), batch_size=8, num_workers=2, multiprocessing_context="fork")
    assert sum(int(batch.sum()) for batch in loader) == 2016
    made.save(step, state).wait({wait})
made.close()
print("done")
"""


def test_a_rank_that_saves_may_fork_its_loaders(url: str) -> None:
    assert output(python(LOADER.format(url=url, wait=WAIT_S))) == "done\n"
    assert steps(url) == [1, 2, 3]


def test_a_job_does_not_end_before_its_last_save_is_stored(url: str) -> None:
    script = f"""
import torch
from perdure.checkpoint.api import Checkpointer
Checkpointer({url!r}, rank=0, world_size=1).save(1, {{"w": torch.ones(1_000_000)}})
"""
    output(python(script))
    assert steps(url) == [1]


def test_a_store_that_is_not_there_is_said_in_words_and_no_credential_with_it(s3: Any) -> None:
    options = s3.options | {"secret": "very-secret"}
    made = Checkpointer("s3://no-such-bucket/run", storage_options=options, rank=0, world_size=1)
    with pytest.raises(StoreError) as caught:
        made.restore({"w": torch.ones(1)})
    assert "no-such-bucket" in str(caught.value)
    assert "very-secret" not in str(caught.value) + caught.value.hint
    (uploader,) = _children(os.getpid(), "checkpoint.uploader")
    assert b"very-secret" not in Path(f"/proc/{uploader}/cmdline").read_bytes()
    assert b"very-secret" not in Path(f"/proc/{uploader}/environ").read_bytes()
    made.close()
    assert _children(os.getpid(), "checkpoint.uploader") == []


def _children(pid: int, mark: str) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [c for c in children if re.search(mark, Path(f"/proc/{c}/cmdline").read_text())]
