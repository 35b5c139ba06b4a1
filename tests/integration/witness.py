"""witness.py SCRIPT ARGS...: runs the script, and writes what each restore of this rank gave.

Into the folder WITNESS: a line `restores` for each call, and the script's own `losses`.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

from perdure.checkpoint.api import Checkpointer, Restored

restore = Checkpointer.restore
folder = os.environ["WITNESS"]


def witnessed(self: Checkpointer, state: Any, **options: Any) -> Restored | None:
    told = {"rank": int(os.environ["RANK"]), "attempt": os.environ.get("PERDURE_ATTEMPT")}
    try:
        restored = restore(self, state, **options)
        told["step"] = restored.step if restored else None
        return restored
    except Exception as error:
        told["error"] = type(error).__name__
        raise
    finally:
        with open(os.path.join(folder, "restores"), "a") as file:
            file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    Checkpointer.restore = witnessed  # type: ignore[method-assign]
    sys.argv = [*sys.argv[1:], "--losses", os.path.join(folder, "losses")]
    runpy.run_path(sys.argv[0], run_name="__main__")
