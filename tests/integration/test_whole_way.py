"""From commit to commit through the real command: damaged checkpoints, and another number of ranks.

Every run here is `perdure run` or `perdure resume` with examples/train_gpt.py on this machine. A
witness around the script writes down what each rank restored; the script itself writes each step's
loss, as the bits of a float, and which samples it learned from. Copies of a run's folder stand for
fresh clusters: another URL, another home, nothing else in common.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from perdure.benchmarks.common import GPT, free_port, perdure
from perdure.checkpoint import lineage
from perdure.checkpoint.manifest import Commit, Point, Receipt
from perdure.checkpoint.store import open_store
from perdure.launchers.job import submit
from perdure.runtime.errors import WireError
from perdure.runtime.opening import ResumeFrom
from perdure.runtime.spec import JobSpec

RANKS, STEPS, BATCH, EVERY = 4, 12, 8, 4
TRAIN = ["--steps", str(STEPS), "--batch", str(BATCH), "--corpus-mb", "1", "--width", "96"]
JOB_S = 120.0

WITNESS = Path(__file__).with_name("witness.py")


@dataclass(frozen=True)
class Place:
    """A machine of its own, as far as perdure can tell: a home, a store, and what was written."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "store" / "whole-way"

    @property
    def url(self) -> str:
        return self.run.as_uri()

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PERDURE_HOME": str(self.folder / "home"),
            "WITNESS": str(self.folder / "written"),
        }

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / "written" / name
        return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []

    def restored(self) -> dict[int, list[int | str | None]]:
        """What each rank restored, or why it could not, attempt by attempt."""
        found: dict[int, list[int | str | None]] = {}
        for row in self.rows("restores"):
            found.setdefault(row["rank"], []).append(row.get("error", row.get("step")))
        return found

    def losses(self) -> dict[int, str]:
        """The bits of each step's loss. No step is made twice where nobody kills."""
        return {row["step"]: row["loss"] for row in self.rows("losses")}

    def samples(self, upto: int = STEPS) -> list[int]:
        return [s for row in self.rows("losses") if row["step"] <= upto for s in row["samples"]]

    def commits(self) -> list[Commit]:
        with open_folder(self.url) as store:
            return lineage.line(lineage.read_history(store))

    def events(self, kind: str) -> list[dict[str, Any]]:
        told = self.perdure("events", self.url, "--json")
        assert told.returncode == 0, told.stderr
        return [e for e in map(json.loads, told.stdout.splitlines()) if e["kind"] == kind]

    def perdure(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command to its end. Its ranks' output goes to files, so stderr is perdure's own."""
        return subprocess.run(
            perdure(*arguments),
            check=False,
            capture_output=True,
            text=True,
            timeout=JOB_S,
            cwd=self.folder,
            env=self.environment,
        )

    def copy(self, to: Path) -> Place:
        """The run's folder, carried to another place; nothing else goes with it."""
        place = make(to)
        shutil.copytree(self.run, place.run)
        return place


def make(folder: Path) -> Place:
    (folder / "written").mkdir(parents=True)
    (folder / "home").mkdir()
    return Place(folder)


@contextmanager
def open_folder(url: str) -> Iterator[Any]:
    store = open_store(url)
    try:
        yield store
    finally:
        store.close()


def command(place: Place, *arguments: str) -> list[str]:
    options = ["--nproc-per-node", str(RANKS), "--store", place.run.parent.as_uri()]
    options += ["--name", "whole-way", "--redirects", "3"]
    return ["run", *options, str(WITNESS), str(GPT), *TRAIN, *arguments]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Four sharded ranks to the end, with commits of steps 4, 8 and 12; never written to again."""
    place = make(tmp_path_factory.mktemp("unbroken") / "place")
    done = place.perdure(*command(place, "--save-every", str(EVERY), "--fsdp"))
    assert done.returncode == 0, done.stderr
    assert [commit.step for commit in place.commits()] == [12, 8, 4]
    assert sorted(place.losses()) == list(range(1, STEPS + 1))
    return place


def damage_a_block_of_one_reader(place: Place, commit: Commit) -> tuple[str, int]:
    """Flip one bit in a block that a single rank reads; which object, and who reads it.

    On the same number of ranks each reads back its own parts. So the block must hold nothing but
    parts of tensors that are sharded over all writers: what is whole, everybody reads.
    """
    with open_folder(place.url) as store:
        manifest = lineage.load_manifest(store, commit)
        for writer, receipt in lineage.load_receipts(store, manifest).items():
            if writer and (block := _own_block(receipt)) is not None:
                break
        else:
            pytest.fail("every block is read by several ranks: the model is too small for this")
    path = place.run / receipt.key
    data = bytearray(path.read_bytes())
    data[receipt.data_start + block * receipt.block + 1000] ^= 0x10
    path.write_bytes(data)
    return receipt.key, writer


def _own_block(receipt: Receipt) -> int | None:
    for block in range(len(receipt.crc32c)):
        begin, end = block * receipt.block, (block + 1) * receipt.block
        inside = [c for c in receipt.chunks if c.begin < end and c.end > begin]
        if inside and all(c.box.sizes != c.shape for c in inside):
            return block
    return None


def test_a_flipped_bit_that_one_rank_reads_sends_all_to_the_older_step(
    tmp_path: Path, unbroken: Place
) -> None:
    place = unbroken.copy(tmp_path / "place")
    newest = place.commits()[0]
    key, _reader = damage_a_block_of_one_reader(place, newest)

    done = place.perdure("resume", place.url)

    assert done.returncode == 0, done.stderr
    failed = place.events("restore_failed")
    assert failed and all(e["point"]["step"] == 12 and key in e["why"] for e in failed)
    went_on_from(place, unbroken, step=8, marked=newest.point)


def test_the_other_node_gives_the_newer_step_up_as_well(
    tmp_path: Path, unbroken: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes have an uploader each: the one whose ranks read good bytes is not told by its own."""
    place = unbroken.copy(tmp_path / "place")
    newest = place.commits()[0]
    key, reader = damage_a_block_of_one_reader(place, newest)
    for name in ("PERDURE_HOME", "WITNESS"):
        monkeypatch.setenv(name, place.environment[name])
    old = JobSpec.from_json((place.run / "spec.json").read_text())
    spec = replace(old, store=place.url, nnodes=2, nproc_per_node=2)

    job = submit(spec, resume=ResumeFrom(), nodes=2)
    try:
        assert job.wait(JOB_S) == 0
    finally:
        with contextlib.suppress(WireError):  # it has ended by itself
            job.stop(at_once=True)

    failed = place.events("restore_failed")
    assert failed and all(key in e["why"] for e in failed)
    assert {e["rank"] // 2 for e in failed} == {reader // 2}, "the other node read it too"
    went_on_from(place, unbroken, step=8, marked=newest.point)


def went_on_from(place: Place, unbroken: Place, *, step: int, marked: Point | None) -> None:
    """All ranks restored `step` in one attempt, and the rest is the unbroken run bit by bit."""
    good = [row for row in place.rows("restores") if "step" in row]
    last = {row["attempt"] for row in good if row["step"] == step}
    assert len(last) == 1, good
    assert {row["rank"]: row["step"] for row in good if row["attempt"] in last} == dict.fromkeys(
        range(RANKS), step
    )
    with open_folder(place.url) as store:
        bad = [mark.point for mark in lineage.read_history(store).bad]
    assert bad == ([] if marked is None else [marked])
    launches = place.events("launch_gang")
    since = [e["restore"] and e["restore"]["step"] for e in launches][1:]  # the first: the base run
    assert since == ([step] if marked is None else [marked.step, step])
    expected = {s: bits for s, bits in unbroken.losses().items() if s > step}
    assert place.losses() == expected
    assert place.samples() == unbroken.samples()[step * BATCH :]
    assert place.commits()[0].step == STEPS, "the run that went on commits its own last step"


def test_a_manifest_cut_short_sends_all_to_the_older_step(tmp_path: Path, unbroken: Place) -> None:
    place = unbroken.copy(tmp_path / "place")
    newest = place.commits()[0]
    cut_short(place, newest)

    done = place.perdure("resume", place.url)

    assert done.returncode == 0, done.stderr
    failed = place.events("restore_failed")
    assert failed and all(newest.manifest in e["why"] for e in failed)
    assert f"{newest.manifest} was altered" in done.stdout + done.stderr
    went_on_from(place, unbroken, step=8, marked=newest.point)


def cut_short(place: Place, commit: Commit) -> None:
    path = place.run / commit.manifest
    path.write_bytes(path.read_bytes()[:-100])


def alter(place: Place, commit: Commit) -> str:
    """Another manifest in the record of a commit, its seal left as it was; the record's key."""
    key = f"checkpoints/commits/{commit.step:012d}-{commit.attempt}.json"
    text = (place.run / key).read_text()
    assert commit.sha256 in text
    (place.run / key).write_text(text.replace(commit.sha256, "0" * 64))
    return key


def test_an_altered_commit_is_told_of_and_the_older_one_is_used(
    tmp_path: Path, unbroken: Place
) -> None:
    place = unbroken.copy(tmp_path / "place")
    key = alter(place, place.commits()[0])

    done = place.perdure("resume", place.url)

    assert done.returncode == 0, done.stderr
    assert key in done.stdout + done.stderr, "nobody was told"
    assert any(key in e["text"] for e in place.events("note"))
    went_on_from(place, unbroken, step=8, marked=None)


def test_no_readable_commit_is_no_reason_to_start_from_nothing(
    tmp_path: Path, unbroken: Place
) -> None:
    """All records altered: refused before a rank starts. All manifests cut: once all were tried."""
    altered = unbroken.copy(tmp_path / "altered")
    keys = [alter(altered, commit) for commit in altered.commits()]
    done = altered.perdure("resume", altered.url)
    assert done.returncode == 2, done.stdout + done.stderr
    assert keys[0] in done.stderr and "--store" in done.stderr
    assert not altered.rows("restores"), "ranks were started"

    cut = unbroken.copy(tmp_path / "cut")
    for commit in cut.commits():
        cut_short(cut, commit)
    done = cut.perdure("resume", cut.url)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "can be restored any more" in done.stdout + done.stderr
    tried = [e["restore"]["step"] for e in cut.events("launch_gang")[1:]]
    assert tried == [12, 8, 4]
    done = cut.perdure("resume", cut.url)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no checkpoint of this run can be restored" in done.stderr
    assert "marked bad" in done.stderr and "--store" in done.stderr
    assert not cut.losses(), "it trained from nothing"


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_half_the_ranks_on_a_fresh_cluster(tmp_path: Path, sharding: str) -> None:
    how = ["--fsdp"] if sharding == "fsdp" else []
    before = make(tmp_path / "before")
    step = stopped_after(before, 4, command(before, *how, "--save-every", "4"))

    again = [before.copy(tmp_path / name) for name in ("one", "two")]
    for place in again:
        done = place.perdure("resume", place.url, "--nproc-per-node", "2")
        assert done.returncode == 0, done.stderr
    plain = before.copy(tmp_path / "plain")
    two_plain_processes(plain, [str(WITNESS), str(GPT), *TRAIN, *how])

    for place in (*again, plain):
        assert place.restored() == {0: [step], 1: [step]}
        assert sorted(place.losses()) == list(range(step + 1, STEPS + 1))
        assert place.losses() == plain.losses(), "not bit by bit"
        seen = before.samples(upto=step) + place.samples()
        assert len(seen) == len(set(seen)) == STEPS * BATCH, "each sample once"


def stopped_after(place: Place, step: int, arguments: list[str]) -> int:
    """Run until `step` is committed, then Ctrl-C; the step of the newest commit."""
    launcher = subprocess.Popen(
        perdure(*arguments),
        cwd=place.folder,
        env=place.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        end_s = time.monotonic() + JOB_S
        while not any((place.run / "checkpoints" / "commits").glob(f"*{step}-*.json")):
            assert launcher.poll() is None and time.monotonic() < end_s, launcher.communicate(5)
            time.sleep(0.002)
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=JOB_S)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 130, f"it was not the stop that ended it:\n{output}"
    newest = place.commits()[0].step
    assert step <= newest < STEPS, "nothing is left to do for the resumed run"
    return newest


def two_plain_processes(place: Place, arguments: list[str]) -> None:
    """No launcher at all: perdure.Checkpointer finds the run's newest commit by itself."""
    environment = {
        **place.environment,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments, "--store", place.url],
            cwd=place.folder,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=JOB_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(told)
