"""`make demo`: a node dies under a training job, and the job ends as if nothing had happened.

On this machine, with real processes: an S3 server (moto's), a Ray cluster of three nodes, a small GPT
on two of them with two ranks each. In mid-run one node is killed with everything on it. Then the same
training is run again and left alone, and the losses of the two are compared bit by bit.

Nothing is left running afterwards. `demo-out/` holds the losses, the journal and the picture.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "demo-out"
STEPS, SAVE_EVERY, KILL_AFTER = 300, 25, 110
RUN_S = 120.0  # bound of one training run
TRAIN = ("train_gpt.py", f"--steps={STEPS}", f"--save-every={SAVE_EVERY}")
BUCKET = "perdure-demo"


def main() -> int:
    try:
        import boto3  # noqa: F401
        import matplotlib  # noqa: F401
        import moto.server  # noqa: F401
    except ImportError as error:
        print(f"the demo needs {error.name}: run `make demo`, or pip install -e '.[demo]'")
        return 2
    from perdure.launchers.ray_nodes import LocalRay

    began = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="perdure-demo-"))
        os.environ |= {"PERDURE_HOME": home, "TMPDIR": home}  # records, nodes' own folders
        say("1. an S3 server (moto's) and a bucket")
        endpoint = stack.enter_context(s3_server())
        told(f"{endpoint}, bucket {BUCKET}")
        say("2. a Ray cluster of three nodes on this machine")
        nodes = stack.enter_context(LocalRay(3, cpus=2))
        told(f"{', '.join(nodes.names)} at {nodes.address}")
        # Only now, and only here: the nodes get the store's credentials over the run's own wire.
        os.environ |= s3_environment(endpoint)

        say("3. training on two nodes with two ranks each, one spare; one node will be killed")
        killed = Training("killed", nodes, spares=1)
        killed.watch(kill=True)
        say("4. the same training, left alone")
        alone = Training("alone", nodes, spares=0)
        alone.watch(kill=False)

        say("5. what happened")
        journal = killed.journal()
        print_story(journal, killed)
        say("6. the losses, bit by bit")
        same = compare(killed, alone)
        picture = OUT / "timeline.png"
        import timeline

        timeline.draw(
            timeline.story_of(journal), killed.steps, killed.kill, killed.recovered_s, picture
        )
    told(f"picture: {picture}")
    told(f"{time.monotonic() - began:.0f} s in all; nothing is left running")
    return 0 if same else 1


@dataclass(slots=True)
class Training:
    """One run, submitted with the command line and watched from outside."""

    name: str
    nodes: Any  # LocalRay
    spares: int
    run: str = ""
    steps: list[tuple[float, int]] = field(default_factory=list)  # (time, step), see `sample`
    lost: set[str] = field(default_factory=set)  # attempts
    ended: bool = False
    kill: tuple[float, str] = (0.0, "")  # when, and which node
    recovered_s: float = 0.0  # from the kill to the first step of the next attempt

    @property
    def log(self) -> Path:
        return OUT / f"{self.name}.jsonl"

    def submit(self) -> str:
        """The run's id."""
        command = [
            str(Path(sys.executable).with_name("perdure")), "submit",
            "--cluster", self.nodes.address, "--nnodes", "2", "--nproc-per-node", "2",
            "--spares", str(self.spares), "--store", f"s3://{BUCKET}", "--name", self.name,
            *TRAIN, "--losses", str(self.log),
        ]  # fmt: skip
        told("$ " + shlex.join(["perdure", *command[1:]]))
        done = subprocess.run(
            command, cwd=HERE, stdout=subprocess.PIPE, text=True, timeout=RUN_S, check=False
        )
        if done.returncode:
            raise SystemExit(f"perdure submit ended with exit code {done.returncode}")
        return done.stdout.split()[0]

    def watch(self, *, kill: bool) -> None:
        """Until the run has ended. Raises SystemExit when it did not end well and in time."""
        from perdure.launchers import records
        from perdure.launchers.ray_submit import connect_ray

        self.run = self.submit()
        record = records.read(self.run)
        assert record is not None, f"submit printed {self.run!r} and keeps no record of it"
        end = time.monotonic() + RUN_S
        told_at = 0.0
        threading.Thread(target=self.sample, daemon=True).start()
        for status, _ in connect_ray(record).watch():
            if time.monotonic() > end:
                raise SystemExit(f"{self.name}: not ended after {RUN_S:.0f} s: {status}")
            if status["attempt"] in self.lost:
                continue  # said before the kill
            if time.monotonic() > told_at + 2.0 or status["phase"] == "finished":
                told_at = time.monotonic()
                told(progress(status))
            if status["phase"] == "finished":
                self.ended = True
                break
            if kill and not self.kill[1] and ripe(status):
                self.lose_a_node(status)
        if status["exit_code"] != 0:
            raise SystemExit(f"{self.name}: {status['because']}")
        if kill and not self.kill[1]:
            raise SystemExit("the run ended before a node could be killed")

    def sample(self) -> None:
        """How far the script is by its own log, twenty times a second: the curve in the picture."""
        while not self.ended:
            if self.log.exists() and (step := last(self.log).get("step")):
                self.steps.append((time.time(), step))
            time.sleep(0.05)

    def lose_a_node(self, status: dict[str, Any]) -> None:
        """Kill a node of the gang, and time how long the training stands still."""
        # Not the head: Ray's own control store lives there, and Ray ends with it.
        node = next(n for n in status["nodes"] if not n.startswith(self.nodes.names[0] + "-"))
        before = last(self.log)["attempt"]
        self.lost.add(before)
        self.kill = (time.time(), node)
        count = self.nodes.kill_node(node.rpartition("-")[0])
        told(f"** killed {node}: its raylet, its agent, its two ranks, {count} processes in all")
        while last(self.log)["attempt"] == before:
            if time.time() > self.kill[0] + 60.0:
                raise SystemExit("no step for 60 s after the kill")
            time.sleep(0.005)
        self.recovered_s = time.time() - self.kill[0]
        told(f"** next step {self.recovered_s:.2f} s after the kill, on the spare")

    def journal(self) -> list[dict[str, Any]]:
        from perdure.checkpoint.store import open_store
        from perdure.runtime import journal

        lines = list(journal.read(open_store(f"s3://{BUCKET}/{self.run}")).events())
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (OUT / f"journal-{self.name}.jsonl").write_text(text)
        return lines

    def losses(self) -> dict[int, tuple[str, list[int]]]:
        """By step: the loss to the last bit, and the samples. What was done twice counts once."""
        rows = map(json.loads, self.log.read_text().splitlines())
        return {row["step"]: (row["loss"], row["samples"]) for row in rows}


def ripe(status: dict[str, Any]) -> bool:
    """Far enough, and far enough from the last checkpoint that there is work to lose."""
    saved = (status["checkpoint"] or {}).get("step", 0)
    return bool(
        status["step"] >= KILL_AFTER and saved and status["step"] >= saved + SAVE_EVERY // 3
    )


def progress(status: dict[str, Any]) -> str:
    saved = (status["checkpoint"] or {}).get("step")
    loss = status.get("loss")
    return (
        f"{status['phase']}, attempt {status['attempt']}: step {status['step']} of {STEPS}"
        + (f", loss {loss:.4f}" if loss is not None else "")
        + (f", checkpoint of step {saved}" if saved is not None else "")
    )


def last(log: Path) -> dict[str, Any]:
    """The last whole line of a log that is being written; {} when there is none yet."""
    row: dict[str, Any] = json.loads(
        log.read_text().rpartition("\n")[0].rpartition("\n")[2] or "{}"
    )
    return row


def print_story(journal: list[dict[str, Any]], killed: Training) -> None:
    from perdure.launchers.words import sentence

    begin = journal[0]["at"]
    rows: list[tuple[float, str]] = []
    for line in journal:
        text = sentence(line)  # a commit is told by every node that sees it
        if text and not (line["kind"] == "checkpoint_committed" and text in dict(rows).values()):
            rows.append((line["at"], text))
    rows.append((killed.kill[0], f"** node {killed.kill[1]} is killed, with everything on it **"))
    for at, text in sorted(rows, key=lambda row: row[0]):
        told(f"{at - begin:7.2f} s  {text}")


def compare(killed: Training, alone: Training) -> bool:
    a, b = killed.losses(), alone.losses()
    differ = [step for step in range(1, STEPS + 1) if a.get(step) != b.get(step)]
    done = len(killed.log.read_text().splitlines())
    told(f"killed run: loss {float.fromhex(a[STEPS][0]):.6f} at step {STEPS} = {a[STEPS][0]}")
    told(f"left alone: loss {float.fromhex(b[STEPS][0]):.6f} at step {STEPS} = {b[STEPS][0]}")
    told(f"steps that were lost and done again: {done - STEPS}")
    if differ:
        told(f"DIFFERENT at {len(differ)} of {STEPS} steps, first at step {differ[0]}")
        return False
    told(f"equal to the last bit at all {STEPS} steps, and the same samples at each")
    return True


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """moto's server in a process of its own, with the bucket; its URL."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    with (OUT / "s3-server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the demo, which then ends the server itself
        )
    try:
        for _ in range(300):
            if server.poll() is not None:
                raise SystemExit(f"the S3 server did not start: see {OUT / 's3-server.log'}")
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
                break
            time.sleep(0.1)
        boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="demo",
            aws_secret_access_key="demo",
        ).create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        server.kill()
        server.wait()


def s3_environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def told(text: str) -> None:
    print(f"   {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
