"""One gang's ranks on this node: their pages, files and processes, from launch to the last exit.

A Gang is made for one attempt and never reused. It knows how to start its ranks warm (the zygote
forks them) or cold (a program each), what they say (`views`), and what became of them (`ended`). When
and why to start or to end them is the agent's business.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perdure.runtime import beatpage, exits, logs, proc, rank_env, sweep
from perdure.runtime.core.codec import attempt_from_text
from perdure.runtime.core.events import Attempt, ExitReport
from perdure.runtime.worker import BEAT_FD, WAKE_FD
from perdure.runtime.zygote_link import FDS_MAX, ZygoteLink, bootstrap


@dataclass(slots=True)
class Rank:
    rank: int
    local_rank: int
    folder: Path
    page: beatpage.BeatPage
    fds: tuple[int, int, int]  # stdout, stderr, beat page: open here until the launch went out
    pid: int | None = None
    report: ExitReport | None = None

    @property
    def error_file(self) -> str:
        return str(self.folder / "error.json")

    @property
    def alive(self) -> bool:
        return self.pid is not None and self.report is None


@dataclass(slots=True)
class Gang:
    attempt: Attempt
    launch: dict[str, Any]
    node: str
    entry: str
    ranks: list[Rank]
    wake_fd: int
    cold: str | None = None
    forking: bool = False
    started: bool = False
    store_pid: int | None = None
    ending: bool = False  # signalled by us: what its ranks do from now on is our doing
    fenced: bool = False
    early: dict[int, int] = field(default_factory=dict)  # ends seen before the pid was known

    def request(self, spec: Mapping[str, Any], env: dict[str, str], cwd: str) -> dict[str, Any]:
        script = os.path.join(cwd, spec["argv"][0])
        path0 = cwd if spec["entry"] == "module" else os.path.dirname(os.path.realpath(script))
        return {
            "env": env,
            "cwd": cwd,
            "entry": spec["entry"],
            "argv": list(spec["argv"]),
            "path0": path0,
            "store": None,
            "ranks": [
                {
                    "rank": rank.rank,
                    "env": rank_env.of_rank(rank.rank, rank.local_rank, rank.error_file),
                    "fds": [2 + 3 * index, 3 + 3 * index, 4 + 3 * index],
                }
                for index, rank in enumerate(self.ranks)
            ],
        }

    def start_warm(
        self, zygote: ZygoteLink, request: dict[str, Any], stdin: int, store: int | None
    ) -> bool:
        """Ask for the forks; the answer comes later. False if it cannot be asked."""
        fds = [stdin, self.wake_fd, *(fd for rank in self.ranks for fd in rank.fds)]
        if store is not None:
            request["store"] = {
                "host": self.launch["master_addr"],
                "port": self.launch["master_port"],
                "fd": len(fds),
            }
            fds.append(store)
        if len(fds) >= FDS_MAX or not zygote.ask(request, fds):
            return False
        self.forking = True
        return True

    def start_cold(self, request: dict[str, Any], stdin: int, why: str) -> None:
        """Start a program a rank. Raises OSError when the machine has no more processes."""
        self.cold, self.forking = why, False
        for rank, asked in zip(self.ranks, request["ranks"], strict=True):
            out, err, beat = rank.fds
            fds = {0: stdin, 1: out, 2: err, BEAT_FD: beat, WAKE_FD: self.wake_fd}
            env = request["env"] | asked["env"]
            if self.entry == "command":
                rank.pid = proc.spawn(request["argv"], env=env, fds=fds, cwd=request["cwd"])
                continue
            memory = os.memfd_create("perdure-rank", os.MFD_CLOEXEC)
            os.write(memory, json.dumps({k: request[k] for k in ("entry", "argv")}).encode())
            os.lseek(memory, 0, os.SEEK_SET)
            argv = [sys.executable, "-u", "-c", bootstrap("worker", str(WAKE_FD + 1))]
            rank.pid = proc.spawn(
                argv, env=env, fds={**fds, WAKE_FD + 1: memory}, cwd=request["cwd"]
            )
            os.close(memory)
        self.launched()

    def forked(self, pids: Mapping[str, int], store: int | None) -> None:
        self.forking = False
        self.store_pid = store
        for rank in self.ranks:
            rank.pid = pids[str(rank.rank)]
        self.launched()

    def launched(self) -> None:
        self.started = True
        self.close_fds()

    def close_fds(self) -> None:
        for rank in self.ranks:
            for fd in rank.fds:
                os.close(fd)
            rank.fds = (-1, -1, -1)

    def of_pid(self, pid: int) -> Rank | None:
        return next((rank for rank in self.ranks if rank.pid == pid), None)

    def ended(self, rank: Rank, status: int, *, oom: bool) -> ExitReport:
        rank.report = exits.report(
            rank=rank.rank,
            node=self.node,
            status=status,
            by_us=self.ending,
            error_file=rank.error_file,
            oom=oom,
        )
        return rank.report

    @property
    def member(self) -> tuple[str, int, int, int]:
        """This node's part: (node, group_rank, first_rank, nproc)."""
        return next(tuple(part) for part in self.launch["members"] if part[0] == self.node)

    @property
    def living(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.alive]

    @property
    def running(self) -> bool:
        """All its ranks live, or ended well."""
        ends = [rank.report for rank in self.ranks if rank.report is not None]
        return self.started and not self.ending and all(end.exit_code == 0 for end in ends)

    @property
    def step(self) -> int:
        return min((rank.page.step for rank in self.ranks), default=0)

    def views(self) -> dict[str, dict[str, object]]:
        return {str(rank.rank): rank.page.read().to_json() for rank in self.ranks}

    def set_fence(self, deadline_s: float | None) -> None:
        for rank in self.ranks:
            rank.page.words[beatpage.FENCE] = 0 if deadline_s is None else int(deadline_s * 1e9)

    def save_at(self, step: int) -> bool:
        """Name the step of a save. Returns whether some rank is past it already.

        The word is written before the steps are read, and `run.due` writes its step before it reads
        the word: a rank that was not seen as past the step will see the word.
        """
        for rank in self.ranks:
            rank.page.words[beatpage.SAVE_AT] = step
        return any(rank.page.step >= step for rank in self.living)

    def ask_to_stop(self) -> None:
        """SIGTERM to the rank alone: its loaders and helpers go on serving its last save."""
        self.ending = True
        for rank in self.living:
            rank.page.words[beatpage.STOP_ASKED] = 1
            assert rank.pid is not None
            # A command may be a shell around the script: only its group has the script in it.
            target = -rank.pid if self.entry == "command" else rank.pid
            sweep.kill([target], signal.SIGTERM)

    def release(self) -> None:
        """Give back pages and descriptors; nothing of this gang runs any more."""
        if not self.started:
            self.close_fds()
        for rank in self.ranks:
            rank.page.close()
        os.close(self.wake_fd)


def make(launch: dict[str, Any], spec: Mapping[str, Any], node: str, log_dir: str) -> Gang:
    """Pages and log folders for this node's part of a launch. Raises KeyError if it has none."""
    attempt = attempt_from_text(launch["attempt"])
    members = {member[0]: member for member in launch["members"]}
    _node, _group_rank, first, nproc = members[node]
    ranks = []
    for local_rank in range(nproc):
        folder = logs.make_folder(log_dir, spec["run"], attempt.counter, local_rank, node)
        page = beatpage.create()
        fds = (*(logs.open_stream(folder, name) for name in logs.STREAMS), page)
        assert len(fds) == 3
        mapped = beatpage.BeatPage(page)
        ranks.append(Rank(first + local_rank, local_rank, folder, mapped, fds))
    wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    return Gang(attempt, launch, node, spec["entry"], ranks, wake)
