"""perdure: a distributed training runtime that survives its machines.

The folders at the top of the repository are this package's parts. The public names below are
imported on first use, so that `import perdure` costs nothing: the command line imports this module
and must import neither torch nor ray.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perdure.checkpoint.api import Checkpointer as Checkpointer
    from perdure.launchers.job import submit as submit
    from perdure.runtime.session import init as init
    from perdure.runtime.spec import JobSpec as JobSpec

__version__ = "0.1.0"

_PUBLIC = {
    "Checkpointer": "perdure.checkpoint.api",
    "JobSpec": "perdure.runtime.spec",
    "init": "perdure.runtime.session",
    "submit": "perdure.launchers.job",
}

__all__ = ["Checkpointer", "JobSpec", "__version__", "init", "submit"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'perdure' has no attribute {name!r}")
