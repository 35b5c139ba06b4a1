"""What perdure's step hook adds to one `optimizer.step()`, in this process, without a launcher.

The optimizer does nothing, so that the difference between a call with the hook and a call without
it is not drowned in arithmetic. The two take turns within a run. The hook writes a real beat page,
and the page is asked afterwards whether it saw every call: a hook that did not run would be free.
"""

from __future__ import annotations

import os
import time

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from perdure.runtime import beatpage, worker


class Idle(torch.optim.Optimizer):
    """Steps without doing anything."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        return None


def _seconds(optimizer: Idle, calls: int) -> float:
    step, started = optimizer.step, time.thread_time()  # others may run beside us
    for _ in range(calls):
        step()
    return time.thread_time() - started


def added_s(calls: int) -> float:
    """Seconds a call. Raises RuntimeError when the hook did not count every step."""
    optimizer = Idle([torch.zeros(1)], {})
    _seconds(optimizer, 1000)  # torch wraps `step` at its first use
    without = _seconds(optimizer, calls)
    fd = beatpage.create()
    page = beatpage.BeatPage(fd)
    before, after = worker.hooks(page)
    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        with_hook = _seconds(optimizer, calls)
        counted = page.step
    finally:
        for handle in handles:
            handle.remove()
        page.close()
        os.close(fd)
    if counted != calls:
        raise RuntimeError(f"the hook counted {counted} of {calls} steps")
    return (with_hook - without) / calls
