"""Runs a training script unchanged and writes a stamp after each optimizer step: the outside clock.

    observed.py SCRIPT ARGS...      with STAMPS=folder in the environment

The benchmarks measure every launcher with this one observer, which knows nothing of any of them: it
asks torch to call it after each optimizer step and appends `pid count monotonic_ns node` to the
file of its rank. A line is one write, so that a SIGKILL leaves whole lines only.

It must never import perdure: it stands for a user's script.
"""

from __future__ import annotations

import os
import runpy
import sys
import time

from torch.optim.optimizer import register_optimizer_step_post_hook


def stamp_each_step(folder: str) -> None:
    """From now on every optimizer step of this process is written down."""
    path = os.path.join(folder, f"rank{os.environ['RANK']}")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    node = os.environ.get("LOCAL_RAY_NODE", "-")
    steps = 0

    def stamp(*_: object) -> None:
        nonlocal steps
        steps += 1
        os.write(file, f"{os.getpid()} {steps} {time.monotonic_ns()} {node}\n".encode())

    register_optimizer_step_post_hook(stamp)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    stamp_each_step(os.environ["STAMPS"])
    runpy.run_path(sys.argv[0], run_name="__main__")
