"""What integration tests share: a real S3 server, and the proof that nothing of ours is left."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from perdure.launchers.ray_nodes import LocalRay

S3_START_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """moto's server in a process of its own: right answers over HTTP, no measure of speed."""

    endpoint: str
    _numbers: Iterator[int]

    @property
    def options(self) -> dict[str, str]:
        return {"key": "AKIDTEST", "secret": "moto-secret", "endpoint_url": self.endpoint}

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "AKIDTEST",
            "AWS_SECRET_ACCESS_KEY": "moto-secret",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def bucket(self) -> str:
        """A fresh, empty bucket as a URL: s3://bucket-N."""
        name = f"bucket-{next(self._numbers)}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        return f"s3://{name}"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One server for the session; a test takes a bucket of its own from it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("moto_server")),
        "-H",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + S3_START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, f"moto_server ended with {server.returncode}"
                assert time.monotonic() < deadline, "moto_server did not answer in time"
                time.sleep(0.05)
        yield S3Server(f"http://127.0.0.1:{port}", itertools.count(1))
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[LocalRay]:
    """Three Ray nodes of two processors; a test that kills one adds one."""
    import ray

    with LocalRay(3, cpus=2) as nodes:
        yield nodes
        ray.shutdown()
