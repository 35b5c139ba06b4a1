"""What a job is: frozen, validated, and nothing read from the environment after it is made.

A JobSpec is written once to `<run>/spec.json` and never changes; what a `resume` may alter (size,
restore point) it alters by making a new spec. Secrets are never in a spec: only their names are.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, Self, get_args

from perdure.runtime.errors import UsageError

Device = Literal["cpu", "cuda", "npu"]
Entry = Literal["script", "module", "command"]

_RUN_ID = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timers:
    """Seconds. Their order is the safety argument, so it is asserted."""

    beat_s: float = 1.0  # a node beats this often
    fence_s: float = 6.0  # an agent without a controller kills its ranks after this
    takeover_s: float = 10.0  # a silent node is given up after this: later than its own fence
    orphan_grace_s: float = (
        180.0  # ... or trains on this long, with a majority of its gang's agents
    )
    start_s: float = 600.0  # from LaunchGang to the first word of every rank
    stop_grace_s: float = 30.0  # from SIGTERM to SIGKILL when a person or a scheduler stops the job
    place_s: float = 600.0  # how long to wait for enough nodes before exit 75

    def __post_init__(self) -> None:
        if not 0 < self.beat_s * 3 <= self.fence_s < self.takeover_s < self.orphan_grace_s:
            raise UsageError(
                "timers out of order: 3 * beat_s <= fence_s < takeover_s < orphan_grace_s must hold",
                hint="leave the timers at their defaults",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How often a job may be restarted before it is given up; a sliding window."""

    restarts: int = 100
    window_s: float = 3600.0
    no_progress_attempts: int = 3  # same signature, no newer commit ...
    no_progress_steps: int = 20  # ... and fewer steps than this, that often in a row: exit 93


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One job. `store` is the URL of the run's own folder (it ends in the run id)."""

    run: str
    entry: Entry
    argv: tuple[str, ...]  # script, module or command first, its arguments after it
    cwd: str
    store: str
    nnodes: int = 1
    nproc_per_node: int = 1
    device: Device = "cpu"
    spares: int = 0
    max_restarts: int | None = (
        None  # None: `budget` alone; a number: torchrun's cap (user, unknown)
    )
    save_every_steps: int | None = None  # for `run.due`; None: `save_every_s` decides
    save_every_s: float = 600.0
    code: Literal["package", "none"] = "package"
    code_sha256: str | None = None  # of `<run>/code/<sha256>.tar.zst`, once packed
    env: dict[str, str] = field(default_factory=dict)
    secret_env: tuple[str, ...] = ()  # names only; values travel on the agents' stream
    warm: bool = True
    log_dir: str | None = None
    redirects: str = (
        "3"  # torchrun's syntax; files are always written, this is what leaves the console
    )
    tee: str = "0"
    tags: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    timers: Timers = field(default_factory=Timers)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        def refuse(what: str, hint: str) -> None:
            raise UsageError(what, hint=hint)

        if not _RUN_ID.match(self.run):
            refuse(
                f"run id {self.run!r} is not usable as a folder name",
                "use lower-case letters, digits, '.', '_' and '-', at most 63 of them",
            )
        if not self.argv:
            refuse("no script was given", "name it last: perdure run [options] SCRIPT [ARGS...]")
        if self.nnodes < 1 or self.nproc_per_node < 1 or self.spares < 0:
            refuse("a job needs at least one node and one process", "check --nnodes, --spares")
        for name, allowed in (("entry", get_args(Entry)), ("device", get_args(Device))):
            if getattr(self, name) not in allowed:
                refuse(f"{name} {getattr(self, name)!r}", f"one of {', '.join(allowed)}")
        if overlap := set(self.env) & set(self.secret_env):
            refuse(f"{sorted(overlap)} are both plain and secret", "pass each variable once")

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises UsageError on anything but the exact fields of this version or fewer."""
        try:
            raw = json.loads(text)
            known = {f.name for f in fields(cls)}
            if unknown := set(raw) - known:
                raise UsageError(
                    f"the spec has unknown fields {sorted(unknown)}",
                    hint="it was written by a newer perdure: use that version",
                )
            raw["timers"] = Timers(**raw.get("timers", {}))
            raw["budget"] = Budget(**raw.get("budget", {}))
            for name in ("argv", "secret_env"):
                raw[name] = tuple(raw.get(name, ()))
            return cls(**raw)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"the spec cannot be read: {error}", hint="was spec.json altered or cut short?"
            ) from error
