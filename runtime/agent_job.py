"""What an agent knows of its job, and getting ready for it: code, and the choice warm or cold.

Ready means: the code is unpacked and it is decided how ranks start. The zygote may still be importing
then; a launch waits in its socket, which is sooner than asking twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from perdure.runtime import code_fetch, proc, rank_env, zygote_link
from perdure.runtime.spec import JobSpec
from perdure.runtime.zygote_link import ZygoteLink


@dataclass(slots=True)
class Job:
    """`cold`: why ranks are not forked; None if they are."""

    raw: dict[str, Any]  # the spec's JSON object
    sha: str
    secrets: dict[str, str] = field(repr=False)
    store_env: dict[str, str] = field(repr=False)
    code: str | None
    cwd: str
    cold: str | None = None
    ready: bool = False
    fetching: int | None = None
    words: int = -1  # what the fetching child says, in a memfd

    @property
    def spec(self) -> JobSpec:
        return JobSpec.from_json(json.dumps(self.raw))

    def rank_variables(self) -> dict[str, str]:
        return {**self.raw["env"], **self.secrets}

    def begin_fetch(self) -> None:
        """Start the child that unpacks the code into `cwd`."""
        assert self.code is not None
        sha256 = os.path.basename(self.code).partition(".")[0]
        config = {
            "store": self.raw["store"],
            "key": self.code,
            "sha256": sha256,
            "target": self.cwd,
        }
        memory = os.memfd_create("perdure-code", os.MFD_CLOEXEC)
        os.write(memory, json.dumps(config).encode())
        os.lseek(memory, 0, os.SEEK_SET)
        self.words = os.memfd_create("perdure-code-words", os.MFD_CLOEXEC)
        self.fetching = proc.spawn(
            [sys.executable, "-c", code_fetch.PROGRAM],
            env={**os.environ, **self.store_env},
            fds={0: memory, 1: self.words, 2: self.words},
        )
        os.close(memory)

    def fetched(self, status: int) -> str | None:
        """The child ended. Returns what went wrong, or None."""
        self.fetching = None
        text = os.pread(self.words, 4096, 0).decode(errors="replace").strip()
        os.close(self.words)
        if status == 0:
            return None
        return text or f"the process that fetches the code ended with status {status}"

    def choose_start(self, zygote: ZygoteLink | None) -> ZygoteLink | None:
        """Decide warm or cold, and return the zygote to use: this one, another, or none."""
        if self.raw["entry"] == "command":
            self.cold = "a command is no Python script that could be forked (--no-python)"
        elif not self.raw["warm"]:
            self.cold = "asked for (--no-warm)"
        elif early := rank_env.script_sets_early(self.raw, self.cwd):
            self.cold = f"the script sets {early} before it imports torch"
        if self.cold is not None:
            return None
        wanted = dict(os.environ)
        if self.raw["nproc_per_node"] > 1:
            wanted.setdefault("OMP_NUM_THREADS", "1")
        wanted |= self.rank_variables()
        needed = rank_env.load_time(wanted)
        if zygote is not None and rank_env.load_time(zygote.environment) == needed:
            return zygote
        kept = {name: value for name, value in os.environ.items() if name not in needed}
        return zygote_link.start(kept | needed)


def make(message: dict[str, Any], state_dir: str) -> Job:
    """Raises UsageError when the spec is not of this version."""
    raw, code = message["spec"], message.get("code")
    text = json.dumps([raw, code], sort_keys=True)
    cwd = raw["cwd"]
    if code:
        cwd = os.path.join(state_dir, "code", os.path.basename(code).partition(".")[0])
    job = Job(
        raw=raw,
        sha=hashlib.sha256(text.encode()).hexdigest(),
        secrets=dict(message.get("secrets") or {}),
        store_env=dict(message.get("store_env") or {}),
        code=code,
        cwd=cwd,
    )
    job.raw = json.loads(job.spec.to_json())  # validated, with every default filled in
    return job
