"""A save as the training loop sees it: one copy into memory that is there already, then onwards.

The arena is the safetensors file itself, so copying the tensors to their places is all that a rank
does; the uploader sends the memory as it is. The layout is worked out once and kept for as long as
the state keeps its names, shapes and boxes. Views of the *arena* are kept, never addresses of the
state: tensors that moved between two saves are read where they are now.

Two arenas: while one is being sent the next save fills the other; a third waits for the oldest
upload. The second one is populated only once there has been a save.

The state may change as soon as `save` returns. It returns when the uploader has taken the arena
over: from then on the death of this rank does not matter.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from perdure.checkpoint import plan
from perdure.checkpoint.arena import Arena
from perdure.checkpoint.errors import CheckpointError, StateError, StoreError
from perdure.checkpoint.flatten import Flat
from perdure.checkpoint.frames import Message
from perdure.checkpoint.leaves import leaf_to_json
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.shards import Share, share_of
from perdure.checkpoint.uploader_client import UploaderClient, UploaderLost, error_from_json

_ARENAS = 2
_SLICE_S = 0.2  # two waiters share one socket: each looks again this often at the latest


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A checkpoint that is whole and can be restored."""

    step: int
    attempt: str
    tier: str = "store"


@dataclass(slots=True)
class _Save:
    id: int
    step: int
    attempt: str
    arena: int
    sent: bool = False
    committed: bool = False
    error: CheckpointError | None = None

    @property
    def over(self) -> bool:
        return self.committed or self.error is not None


class Handle:
    """One save of this rank. Its state is staged; the checkpoint exists once it is committed."""

    def __init__(self, save: _Save, look: Callable[[float], None]) -> None:
        self._save = save
        self._look = look

    @property
    def step(self) -> int:
        return self._save.step

    def done(self) -> bool:
        """Whether `wait` would return or raise at once. Never blocks."""
        if not self._save.over:
            self._look(0.0)
        return self._save.over

    def wait(self, timeout_s: float | None = None) -> Committed:
        """Until all ranks' parts are stored and the checkpoint is committed.

        Raises TimeoutError after `timeout_s` (the save goes on), and the CheckpointError for which
        this checkpoint will never exist.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.done():
            left = _SLICE_S if deadline is None else min(_SLICE_S, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"step {self.step} was not committed within {timeout_s} s")
            self._look(left)
        if self._save.error is not None:
            raise self._save.error
        return Committed(step=self.step, attempt=self._save.attempt)


@dataclass(slots=True)
class _Layout:
    """Where everything lies: the same for both arenas."""

    id: int
    key: tuple[object, ...]
    image: plan.FileImage
    header: bytes
    arenas: list[Arena] = field(default_factory=list)
    views: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # by arena, by name


class Saver:
    """The rank's side of saving. Owned by a Checkpointer; one thread uses it."""

    def __init__(self, client: UploaderClient, rank: int, world_size: int) -> None:
        self._client = client
        self._rank, self._world_size = rank, world_size
        self._layout: _Layout | None = None
        self._saves: dict[int, _Save] = {}  # those that are not over
        self._next = 0
        client.listen(self.on_news, self.on_lost)

    def prepare(self, flat: Flat) -> None:
        """Lay out the first arena and populate it in the background."""
        self._layout_for(share_of(flat, self._rank, self._world_size))

    def ready(self, timeout_s: float | None) -> bool:
        """Whether the next save finds an arena whose pages are all there."""
        arenas = self._layout.arenas if self._layout else []
        return bool(arenas) and arenas[0].populated(timeout_s)

    def save(self, step: int, flat: Flat, attempt: str, parent: Point | None) -> Handle:
        """Raises StateError on what cannot be stored, UploaderLost when two uploaders died."""
        share = share_of(flat, self._rank, self._world_size)
        leaves = {path: leaf_to_json(value, path) for path, value in share.leaves.items()}
        try:
            return self._stage(step, share, leaves, attempt, parent)
        except UploaderLost:  # the state is still here: a new uploader takes it
            return self._stage(step, share, leaves, attempt, parent)

    def _stage(
        self,
        step: int,
        share: Share,
        leaves: dict[str, object],
        attempt: str,
        parent: Point | None,
    ) -> Handle:
        started_at = time.time()
        layout = self._layout_for(share)
        arena = self._free_arena(layout)
        _copy(share, layout.views[arena.id])
        self._next += 1
        save = _Save(self._next, step, attempt, arena.id)
        self._saves[save.id] = save
        try:
            self._client.request(
                {
                    "kind": "staged",
                    "save": save.id,
                    "arena": arena.id,
                    "layout": layout.id,
                    "step": step,
                    "attempt": attempt,
                    "parent": parent._asdict() if parent else None,
                    "leaves": leaves,
                    "started_at": started_at,
                }
            )
        except CheckpointError:
            self._saves.pop(save.id, None)
            raise
        if len(layout.arenas) < _ARENAS:  # should the next save come before this upload's end
            self._add_arena(layout).populate()
        return Handle(save, self.look)

    def look(self, timeout_s: float) -> None:
        """Take in news about saves, waiting at most `timeout_s` for some."""
        # Polled outside the client's lock: a save on another thread must not wait for a waiter.
        if timeout_s > 0 and (fd := self._client.fileno()) >= 0:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(timeout_s * 1000)
        self._client.look()

    def on_news(self, news: Message) -> None:
        save = self._saves.get(news["save"])
        if save is None:
            return
        if news["kind"] == "committed":
            save.committed = True
        elif news["kind"] == "failed":
            save.error = error_from_json(news)
        # A failed upload has let go of its arena too.
        save.sent = True
        if save.over:
            del self._saves[save.id]

    def on_lost(self, error: CheckpointError) -> None:
        """The uploader is gone, and its arenas with it: nothing under way will be committed."""
        for save in self._saves.values():
            save.error = error
        self._saves.clear()
        self._layout = None

    def closed(self) -> None:
        """The Checkpointer is closed: what is not known by now is not learnt here any more."""
        self.on_lost(
            StoreError(
                "the Checkpointer was closed before this checkpoint was known to be committed",
                hint="it may still be: see checkpoints/commits/ in its folder; wait() before close()",
            )
        )

    def _layout_for(self, share: Share) -> _Layout:
        self._client.look()  # an uploader that died since the last save is noticed here
        key = share.shape_key()
        if self._layout is None or self._layout.key != key:
            old, self._layout = self._layout, None
            for arena in old.arenas if old else ():
                arena.stop_populating()
                self._client.request({"kind": "free", "arena": arena.id})
            layout = self._send_layout(share, key)
            self._add_arena(layout)
            layout.arenas[0].populate()
            self._layout = layout
        return self._layout

    def _send_layout(self, share: Share, key: tuple[object, ...]) -> _Layout:
        image = plan.file_image([part.slot for part in share.parts])
        self._next += 1
        self._client.request(
            {
                "kind": "layout",
                "layout": self._next,
                "size": image.size,
                "data_start": len(image.header),
                "chunks": [
                    [c.fqn, c.dtype, c.shape, c.box.offsets, c.box.sizes, c.begin, c.end]
                    for c in image.chunks
                ],
                "aliases": share.aliases,
                "names": share.names,
            }
        )
        return _Layout(self._next, key, image, image.header)

    def _add_arena(self, layout: _Layout) -> Arena:
        size = layout.image.size
        reply, fds = self._client.request({"kind": "arena", "size": size})
        arena = Arena(fds[0], size, reply["arena"])
        layout.arenas.append(arena)
        layout.views[arena.id] = _views(arena, layout.image)
        return arena

    def _free_arena(self, layout: _Layout) -> Arena:
        """One that is not being sent, its header in place; waits for the oldest upload if need be."""
        while True:
            busy = {save.arena for save in self._saves.values() if not save.sent}
            free = [arena for arena in layout.arenas if arena.id not in busy]
            if not free and len(layout.arenas) < _ARENAS:
                free = [self._add_arena(layout)]
            if free:
                free[0].stop_populating()
                free[0].map[: len(layout.header)] = layout.header
                return free[0]
            self.look(_SLICE_S)  # bounded by the store's deadline: an upload ends or fails


def _views(arena: Arena, image: plan.FileImage) -> dict[str, torch.Tensor]:
    """Tensors that lie in the arena, by fqn: what `_copy` fills."""
    raw = torch.frombuffer(arena.map, dtype=torch.uint8)
    start = len(image.header)
    return {
        chunk.fqn: raw[start + chunk.begin : start + chunk.end]
        .view(getattr(torch, chunk.dtype))
        .view(chunk.box.sizes)
        for chunk in image.chunks
    }


@torch.no_grad()
def _copy(share: Share, views: dict[str, torch.Tensor]) -> None:
    for part in share.parts:
        if part.slot.nbytes:
            views[part.slot.fqn].copy_(part.local)


def check_step(step: int, last: int | None) -> None:
    """Steps rise within an attempt: a checkpoint is found by its step. Raises StateError."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise StateError(f"step {step!r}", hint="give the number of optimizer steps done so far")
    if last is not None and step < last:
        raise StateError(
            f"step {step} comes after step {last} was saved in this attempt",
            hint="steps only rise within an attempt; `perdure resume RUN --step N` goes back",
        )
