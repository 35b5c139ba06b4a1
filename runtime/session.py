"""What a training script may call. Everything here is optional, and works without perdure around it.

Under an agent the numbers come from the rank's environment and the beat page; under torchrun or plain
python there is no page, and `due` is a plain interval. A script that calls `run.beat` or `run.due` has
named its step: from then on optimizer steps are no longer counted for it.

It must never make a rank wait: no message, no collective, no synchronising with a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from perdure.runtime import beatpage
from perdure.runtime.errors import UsageError

if TYPE_CHECKING:
    from perdure.checkpoint.api import Checkpointer

EVERY_WITHOUT_AGENT = 1000  # steps between saves where nobody named an interval


class _Scalar(Protocol):
    """A loss as scripts have it: a float, or a tensor of one element."""

    def __float__(self) -> float: ...


class Run:
    """This rank, and what its run wants of it. Made by `perdure.init()`."""

    def __init__(self, *, save_every: int | None, total_steps: int | None) -> None:
        self.rank = _number("RANK", 0)
        self.world_size = _number("WORLD_SIZE", 1)
        self.local_rank = _number("LOCAL_RANK", 0)
        #: "term.counter" under an agent, None without one
        self.attempt = os.environ.get("PERDURE_ATTEMPT") or None
        beatpage.mine = beatpage.mine or beatpage.from_environment()
        self._page = beatpage.mine
        self._every = save_every or _number("PERDURE_SAVE_EVERY", 0)
        if not self._every and self._page is None:
            self._every = EVERY_WITHOUT_AGENT
        self._checkpointer: Checkpointer | None = None
        if self._page is not None and total_steps:
            self._page.words[beatpage.TOTAL] = total_steps

    def checkpointer(self) -> Checkpointer:
        """The run's checkpoints: the same object at each call.

        Raises UsageError where no store is known (without an agent, unless PERDURE_STORE is set).
        """
        if self._checkpointer is None:
            url = os.environ.get("PERDURE_STORE", "")
            if not url:
                raise UsageError(
                    "no store is known to this script: it was not started by perdure",
                    hint="set PERDURE_STORE to a URL, or make perdure.Checkpointer(URL) yourself",
                )
            from perdure.checkpoint.api import Checkpointer

            self._checkpointer = Checkpointer(url)
        return self._checkpointer

    def due(self, step: int) -> bool:
        """Save after `step`? True at the same steps on every rank of the gang.

        That is: at multiples of the interval (`save_every`, else --save-every; without an agent 1000),
        and at the step that the controller named, which it chooses ahead of all ranks.
        """
        page = self._page
        if page is not None:
            page.counted_by_script = True
            page.words[beatpage.USES_DUE] = 1
            self._at(page, step)  # before the word is read: see Gang.save_at
            if step and page.words[beatpage.SAVE_AT] == step:
                return True
        return bool(self._every) and step > 0 and step % self._every == 0

    def beat(self, step: int, loss: float | _Scalar | None = None) -> None:
        """Say how far this rank is. A loss that lies on a device is not fetched: pass a float."""
        page = self._page
        if page is None:
            return
        page.counted_by_script = True
        if loss is not None and not _on_a_device(loss):
            page.write_loss(float(loss))
        self._at(page, step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what goes on meanwhile, so that a pause is not taken for a hang.

        One of restore, save, eval, compile, other; any other word counts as other.
        """
        page = self._page
        if page is None:
            yield
            return
        before: int = page.words[beatpage.PHASE]
        known = beatpage.PHASES.index(name) if name in beatpage.PHASES else beatpage.OTHER
        page.write_phase(known)
        try:
            yield
        finally:
            page.write_phase(before)

    def stopping(self) -> bool:
        """Has a stop been asked for? The process gets SIGTERM as well, as under torchrun."""
        return self._page is not None and bool(self._page.words[beatpage.STOP_ASKED])

    def _at(self, page: beatpage.BeatPage, step: int) -> None:
        first = page.words[beatpage.STEP] == 0 and step > 0
        page.write_step(step)
        if page.words[beatpage.PHASE] == beatpage.START and step > 0:
            page.words[beatpage.PHASE] = beatpage.TRAIN
        if first:
            beatpage.wake_agent()


def init(*, save_every: int | None = None, total_steps: int | None = None) -> Run:
    """Join the run this process belongs to, if any.

    save_every: steps between saves, for `run.due`. total_steps: where the script ends, for people who
    watch. Raises UsageError when one of them is not positive.
    """
    for name, value in (("save_every", save_every), ("total_steps", total_steps)):
        if value is not None and value < 1:
            raise UsageError(
                f"{name} is {value}", hint=f"give {name} as a positive number of steps"
            )
    return Run(save_every=save_every, total_steps=total_steps)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _on_a_device(loss: object) -> bool:
    device = getattr(loss, "device", None)
    return device is not None and getattr(device, "type", "cpu") != "cpu"
