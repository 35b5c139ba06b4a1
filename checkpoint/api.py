"""The Checkpointer: what a training script calls to save and to restore.

Two ways to live. **Under an agent** the environment says which attempt this is and which checkpoint
the whole gang restores: one decision, made by the controller, never by a rank. **Without one**
(torchrun, plain python) rank 0 decides through the store and the others ask it there; no collective
is used, so a Checkpointer works before, after and without `init_process_group`.

A checkpoint that cannot be verified must be given up by the whole gang, since all ranks restore one
step. Under an agent the rank reports and raises; the controller starts an attempt with an older one.
Without an agent a single process marks it bad and takes the older one at once; one rank of several
cannot (the others may be training on the newer one already), so it marks the checkpoint bad and
raises: the launcher restarts all ranks, and rank 0 then decides for the older one.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from typing import Any

from perdure.checkpoint import save as saving
from perdure.checkpoint.errors import CheckpointError, FormatError, IntegrityError, StateError
from perdure.checkpoint.flatten import flatten
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.restore import Restored, restore
from perdure.checkpoint.save import Committed, Handle, Saver
from perdure.checkpoint.store import without_userinfo
from perdure.checkpoint.uploader_client import UploaderClient

__all__ = ["Checkpointer", "Committed", "Handle", "Restored"]

# What launchers tell all ranks of a gang alike, and another gang differently.
_TOLD_ALIKE = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
)


class Checkpointer:
    """Saves and restores one run's state. For one thread of the process that made it."""

    def __init__(
        self,
        url: str,
        *,
        storage_options: dict[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        attempt: str | None = None,
        uploader: str | None = None,
        restore: str | None = None,
    ) -> None:
        """`url` is the run's folder; `storage_options` are spelled as s3fs spells them.

        `rank` and `world_size` default to RANK and WORLD_SIZE, else 0 and 1. The rest is the
        agent's word, taken from the environment when `url` is the run's: `attempt` ("2.7"),
        `uploader` (path of a socket), `restore` (JSON of a step and its attempt, "" for none).
        """
        environ = os.environ
        self._rank = int(environ.get("RANK", 0)) if rank is None else rank
        self._world_size = int(environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
        if uploader is None and without_userinfo(url) == environ.get("PERDURE_STORE"):
            uploader = environ.get("PERDURE_UPLOADER")
            attempt = environ.get("PERDURE_ATTEMPT") if attempt is None else attempt
            restore = environ.get("PERDURE_RESTORE") if restore is None else restore
        self._decided = attempt is not None  # by the controller: not ours to change
        self._attempt = attempt
        self._parent = _point(restore)
        self._client = UploaderClient(
            url,
            storage_options=storage_options,
            socket_path=uploader,
            rank=self._rank,
            world_size=self._world_size,
            attempt=attempt,
        )
        self._saver = Saver(self._client, self._rank, self._world_size)
        self._last: Handle | None = None
        # Also at the interpreter's end: a job must not be over before its last save is stored.
        self._finalizer = weakref.finalize(self, _close, self._client, self._saver)

    def prepare(self, state: Any) -> None:
        """Lay the arena out for `state` in the background, so that the first save is as fast as the
        others. `restore` does it too. Raises StateError."""
        self._client.check_process()
        self._saver.prepare(flatten(state))

    def ready(self, timeout_s: float | None = 0.0) -> bool:
        """Whether the arena is laid out; waits at most `timeout_s` (None: until it is)."""
        self._client.check_process()
        return self._saver.ready(timeout_s)

    def save(self, step: int, state: Any) -> Handle:
        """Stage `state` as the checkpoint of `step`; it may change as soon as this returns.

        Every rank calls this with the same step. Blocks for one copy of this rank's part, and for
        the upload of the save before the last one if that is still going on. Saving the last step
        again returns its handle. Raises StateError when the state cannot be stored or steps fall,
        StoreError when no uploader can be had, ForkError in a forked child.
        """
        self._client.check_process()
        saving.check_step(step, self._last.step if self._last else None)
        if self._last is not None and self._last.step == step:
            return self._last
        flat = flatten(state)
        attempt = self._agree(restore=False, step=None)
        self._last = self._saver.save(step, flat, attempt, self._parent)
        return self._last

    def restore(self, state: Any, *, step: int | None = None) -> Restored | None:
        """Fill `state` in place from the gang's restore point, None when there is nothing yet.

        Every rank calls this. Nothing of `state` is touched unless every byte was verified. `step`
        names another checkpoint of the run, where no controller has decided. Raises StateError
        (with all misfits) when the state does not fit, IntegrityError or FormatError when the
        checkpoint cannot be trusted, StoreError when the store does not answer.
        """
        self._client.check_process()
        while True:
            attempt = self._agree(restore=True, step=step)
            point = self._parent
            if step is not None and (point is None or point.step != step):
                raise StateError(
                    f"attempt {attempt} restores {point or 'nothing'}, not step {step}",
                    hint=f"go back with: perdure resume RUN --step {step}; without a controller "
                    "restore before the first save",
                )
            flat = flatten(state)
            if point is None:
                self._saver.prepare(flat)
                return None
            try:
                restored = restore(self._client, flat, point)
            except (IntegrityError, FormatError) as error:
                self._give_up(point, error)
                continue
            self._saver.prepare(flatten(state))
            return restored

    def close(self) -> None:
        """Let go of the uploader. Without an agent this waits until what is staged is stored."""
        self._finalizer()

    def _agree(self, *, restore: bool, step: int | None) -> str:
        """The attempt; without a controller the first call decides it, and what to restore."""
        if self._attempt is None:
            reply, _ = self._client.request(
                {
                    "kind": "meet",
                    "meeting": _meeting(self._world_size),
                    "restore": restore,
                    "step": step,
                }
            )
            self._attempt = str(reply["attempt"])
            self._parent = Point(**reply["restore"]) if reply["restore"] else None
        return self._attempt

    def _give_up(self, point: Point, error: CheckpointError) -> None:
        """`point` cannot be trusted: returns when this process may choose an older one by itself."""
        if self._decided:
            raise error  # the uploader has told the agent
        self._client.request({"kind": "bad", "point": point._asdict(), "why": str(error)})
        if self._world_size > 1:
            error.hint = (
                f"{point} is marked bad. Restart the job (torchrun does, with --max-restarts): all "
                "ranks then restore the checkpoint before it."
            )
            raise error
        self._attempt = None  # a new attempt, whose parent is the older checkpoint


def _close(client: UploaderClient, saver: Saver) -> None:
    client.close()
    saver.closed()


def _point(restore: str | None) -> Point | None:
    if not restore:
        return None
    raw = json.loads(restore)
    return Point(int(raw["step"]), str(raw["attempt"]))


def _meeting(world_size: int) -> str:
    told = [os.environ.get(name, "") for name in _TOLD_ALIKE] + [str(world_size)]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:24]
