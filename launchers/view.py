"""A run as people are shown it: the status object of DESIGN part 6, read once and typed.

The status comes from a controller, or from a journal that another version wrote, so every key but
`run` may be missing: what is not known is None or empty and is left out of the picture, never
guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Json = Mapping[str, object]


def text_of(raw: Json, key: str) -> str:
    value = raw.get(key)
    return value if isinstance(value, str) else ""


def number_of(raw: Json, key: str) -> float | None:
    value = raw.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def whole_of(raw: Json, key: str) -> int | None:
    value = number_of(raw, key)
    return None if value is None else int(value)


def objects_of(raw: Json, key: str) -> list[Json]:
    value = raw.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def object_of(raw: Json, key: str) -> Json | None:
    value = raw.get(key)
    return value if isinstance(value, Mapping) else None


def texts_of(raw: Json, key: str) -> tuple[str, ...]:
    value = raw.get(key)
    if not isinstance(value, list | tuple):
        return ()
    return tuple(item for item in value if isinstance(item, str))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    at_s: float
    kind: str
    blame: str
    rank: int | None
    node: str | None
    because: str

    @classmethod
    def read(cls, raw: Json) -> Fault:
        return cls(
            at_s=number_of(raw, "at") or 0.0,
            kind=text_of(raw, "kind"),
            blame=text_of(raw, "blame") or "unknown",
            rank=whole_of(raw, "rank"),
            node=text_of(raw, "node") or None,
            because=text_of(raw, "because"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RootCause:
    """How the rank that began it ended; `log` is its stderr file where one is known."""

    rank: int
    node: str
    error: str
    where: str
    traceback: str
    log: str
    exit_code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    run: str
    phase: str
    because: str
    waiting_for: str
    attempt: str | None
    step: int
    total_steps: int | None
    steps_per_s: float
    loss: float | None
    can_save: bool  # the script has asked run.due: it saves when told to
    world_size: int
    nodes: tuple[str, ...]
    spares: tuple[str, ...]
    restarts: int
    faults: tuple[Fault, ...]
    checkpoint_step: int | None
    checkpoint_tier: str
    checkpoint_at_s: float | None
    root: RootCause | None
    exit_code: int | None
    log_dir: str

    @classmethod
    def read(cls, raw: Json) -> RunView:
        point = object_of(raw, "checkpoint") or {}
        return cls(
            run=text_of(raw, "run"),
            phase=text_of(raw, "phase") or "unknown",
            because=text_of(raw, "because"),
            waiting_for=text_of(raw, "waiting_for"),
            attempt=text_of(raw, "attempt") or None,
            step=whole_of(raw, "step") or 0,
            total_steps=whole_of(raw, "total_steps") or None,
            steps_per_s=number_of(raw, "steps_per_s") or 0.0,
            loss=number_of(raw, "loss"),
            can_save=raw.get("can_save") is True,
            world_size=whole_of(raw, "world_size") or 0,
            nodes=texts_of(raw, "nodes"),
            spares=texts_of(raw, "spares"),
            restarts=whole_of(raw, "restarts") or 0,
            faults=tuple(Fault.read(item) for item in objects_of(raw, "faults")),
            checkpoint_step=whole_of(point, "step"),
            checkpoint_tier=text_of(point, "tier"),
            checkpoint_at_s=number_of(point, "at"),
            root=_root(object_of(raw, "root_cause")),
            exit_code=whole_of(raw, "exit_code"),
            log_dir=text_of(raw, "log_dir"),
        )

    @property
    def fraction(self) -> float | None:
        return None if not self.total_steps else min(1.0, self.step / self.total_steps)

    @property
    def left_s(self) -> float | None:
        """Time left, when the script said its end and steps are being made."""
        if not self.total_steps or self.steps_per_s <= 0 or self.phase != "running":
            return None
        return max(0, self.total_steps - self.step) / self.steps_per_s


def _root(raw: Json | None) -> RootCause | None:
    if raw is None:
        return None
    return RootCause(
        rank=whole_of(raw, "rank") or 0,
        node=text_of(raw, "node"),
        error=text_of(raw, "error"),
        where=text_of(raw, "where"),
        traceback=text_of(raw, "traceback"),
        log=text_of(raw, "log"),
        exit_code=whole_of(raw, "exit_code"),
        signal=whole_of(raw, "signal"),
    )


def span(seconds: float) -> str:
    """'0.14 s', '12 s', '5 min 03 s', '2 h 05 min', '3 d 04 h': two parts at most."""
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, lower, step in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // step:02d} {lower}"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def whole_span(seconds: float) -> str:
    """For what is shown again and again: no digits that flicker."""
    return f"{int(seconds)} s" if seconds < 10 else span(seconds)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def rate(steps_per_s: float) -> str:
    if steps_per_s >= 100:
        return f"{steps_per_s:,.0f} steps/s"
    if steps_per_s >= 0.95:
        return f"{steps_per_s:.1f} steps/s"
    return f"{1 / steps_per_s:.1f} s/step" if steps_per_s > 0 else ""
