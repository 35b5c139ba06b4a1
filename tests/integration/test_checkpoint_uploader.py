"""Checkpoints through real uploader processes, real stores and real kills."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.checkpoint.api import Checkpointer
from perdure.checkpoint.errors import IntegrityError
from perdure.checkpoint.lineage import read_history
from perdure.checkpoint.store import open_store
from perdure.checkpoint.uploader_client import UploaderLost, uploader_argv

WAIT_S = 60.0


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S} s"
        time.sleep(0.02)


def steps(url: str, options: dict[str, str] | None = None) -> list[int]:
    return sorted(commit.step for commit in read_history(open_store(url, options)).commits)


class Agent:
    """As much of an agent as an uploader knows: its socket, its pipe, and who starts it."""

    def __init__(self, folder: Path, url: str, options: dict[str, str] | None) -> None:
        self.path = str(folder / "up.sock")
        self._url, self._options = url, options
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        fds = [self._listener.fileno(), self._writing]
        process = subprocess.Popen(uploader_argv(), stdin=subprocess.PIPE, pass_fds=fds)
        config = {
            "store": self._url,
            "storage_options": self._options,
            "listen_fd": fds[0],
            "control_fd": fds[1],
            "run": "test",
        }
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(json.dumps(config).encode())
        self.process = process
        return process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def told(self) -> list[dict[str, Any]]:
        try:
            text = os.read(self._reading, 1 << 16)
        except BlockingIOError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def rank(self, rank: int = 0, of: int = 1, attempt: str = "1.1", **more: Any) -> Checkpointer:
        return Checkpointer(
            self._url, rank=rank, world_size=of, attempt=attempt, uploader=self.path, **more
        )

    def close(self) -> None:
        os.close(self._writing)
        os.close(self._reading)  # nobody reads any more: the uploader must leave by itself
        if self.process.poll() is None:
            self.process.wait(WAIT_S)
        self._listener.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


@pytest.fixture
def agent(tmp_path: Path, url: str) -> Iterator[Agent]:
    made = Agent(tmp_path, url, None)
    yield made
    made.close()


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
made = Checkpointer({url!r}, rank=0, world_size=1, **{more!r})
made.restore({{"w": torch.zeros(4_000_000)}})
made.save(7, {{"w": torch.ones(4_000_000)}})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_killed_right_after_staged_loses_nothing(url: str, agent: Agent) -> None:
    rank = python(DYING.format(url=url, more={"attempt": "1.1", "uploader": agent.path}))
    rank.communicate(timeout=WAIT_S)
    assert rank.returncode == -signal.SIGKILL
    until(lambda: steps(url) == [7], "the commit of what was staged")
    assert {"kind": "committed", "attempt": "1.1", "step": 7, "tier": "store"} in agent.told()


class Gate:
    """In front of the S3 server: lets everything pass but the shards, while it is shut."""

    def __init__(self, endpoint: str) -> None:
        self.open, self.waiting = threading.Event(), threading.Event()
        gate, behind = self, endpoint.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if self.command == "PUT" and ".safetensors" in self.path:
                    gate.waiting.set()
                    assert gate.open.wait(WAIT_S)
                connection = http.client.HTTPConnection(behind, timeout=WAIT_S)
                headers = dict(self.headers) | {"Connection": "close"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                with contextlib.suppress(OSError):  # whoever asked may have been killed
                    self.send_response_only(answer.status, answer.reason)
                    for name, value in answer.getheaders():
                        if name.lower() not in (
                            "content-length",
                            "transfer-encoding",
                            "connection",
                        ):
                            self.send_header(name, value)
                    size = answer.getheader("Content-Length") if self.command == "HEAD" else None
                    self.send_header("Content-Length", size or str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

            def log_message(self, *_: object) -> None:
                """Not on the test's output."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.open.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(WAIT_S)


@pytest.fixture
def gate(s3: Any) -> Iterator[Gate]:
    made = Gate(s3.endpoint)
    yield made
    made.close()


@pytest.fixture
def gated(tmp_path: Path, s3: Any, gate: Gate) -> Iterator[Agent]:
    made = Agent(tmp_path, f"{s3.bucket()}/run", s3.options | {"endpoint_url": gate.endpoint})
    yield made
    gate.open.set()
    made.close()


def test_the_uploader_killed_in_mid_upload_commits_nothing_and_the_next_save_works(
    gated: Agent, gate: Gate, s3: Any
) -> None:
    rank = gated.rank()
    lost = rank.save(1, {"w": torch.ones(1000)})
    assert gate.waiting.wait(WAIT_S)
    gated.kill()
    with pytest.raises(UploaderLost):
        lost.wait(WAIT_S)
    assert steps(gated._url, s3.options) == []
    gate.open.set()
    gated.start()
    assert rank.save(2, {"w": torch.ones(1000)}).wait(WAIT_S).step == 2
    assert steps(gated._url, s3.options) == [2]
    rank.close()


def test_an_uploader_that_died_unnoticed_is_replaced_within_the_save(agent: Agent) -> None:
    rank = agent.rank()
    rank.save(1, {"w": torch.ones(1000)}).wait(WAIT_S)
    agent.kill()
    agent.start()
    assert rank.save(2, {"w": torch.ones(1000)}).wait(WAIT_S).step == 2
    rank.close()


def test_sigterm_finishes_what_is_staged(gated: Agent, gate: Gate, s3: Any) -> None:
    rank = gated.rank()
    rank.save(1, {"w": torch.ones(1000)})
    assert gate.waiting.wait(WAIT_S)
    gated.process.terminate()
    gate.open.set()
    assert gated.process.wait(WAIT_S) == 0
    assert steps(gated._url, s3.options) == [1]
    rank.close()


def test_a_third_save_waits_for_the_oldest_upload_and_a_second_does_not(
    gated: Agent, gate: Gate
) -> None:
    rank = gated.rank()
    handles = [rank.save(step, {"w": torch.full((1000,), float(step))}) for step in (1, 2)]
    assert not any(handle.done() for handle in handles)  # both staged, none uploaded
    opener = threading.Timer(0.3, gate.open.set)
    opener.start()
    handles.append(rank.save(3, {"w": torch.full((1000,), 3.0)}))
    assert gate.open.is_set()
    assert [handle.wait(WAIT_S).step for handle in handles] == [1, 2, 3]
    opener.join()
    rank.close()


def test_an_idle_uploader_costs_nothing(agent: Agent) -> None:
    rank = agent.rank()
    rank.save(1, {"w": torch.ones(1000)}).wait(WAIT_S)

    def ticks() -> int:
        fields = Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(1.0)
    assert ticks() - before <= 1  # of 100 a second
    rank.close()


def flip_last_bit(root: Path, step: int) -> None:
    (shard,) = root.glob(f"checkpoints/objects/step-{step:012d}/*/w0.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(data)


def test_four_ranks_one_flipped_bit_that_one_rank_reads(agent: Agent, tmp_path: Path) -> None:
    """The rank that reads it is refused and the agent hears of it, once: the gang then goes back."""
    states = [{"rng": {f"rank{rank}": torch.full((50_000,), float(rank))}} for rank in range(4)]
    ranks = [agent.rank(rank, 4) for rank in range(4)]
    handles = [r.save(3, state) for r, state in zip(ranks, states, strict=True)]
    for handle in handles:
        handle.wait(WAIT_S)
    agent.told()
    flip_last_bit(tmp_path / "store", 3)
    point = '{"step": 3, "attempt": "1.1"}'
    refused = []
    for rank, state in enumerate(states):
        made = agent.rank(rank, 4, "1.2", restore=point)
        try:
            made.restore(state)
        except IntegrityError:
            refused.append(rank)
        made.close()
    assert refused == [0]  # only rank 0 reads that bit; the controller stops the others
    assert [line["kind"] for line in agent.told()] == ["restore_failed"]
    for made in ranks:
        made.close()
