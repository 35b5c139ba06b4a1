"""What the command line may not import: every module it loads is paid before the first step.

A fresh interpreter is asked, because this one has everything loaded already. What `perdure run`
itself loads, to the very end of a job, is watched in tests/integration/test_examples.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("asyncio", "fsspec", "numpy", "obstore", "ray", "rich", "s3fs", "torch")


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter once the statement ran."""
    code = (
        "import sys, json, atexit\n"
        "tops = lambda: sorted({name.split('.')[0] for name in sys.modules})\n"
        "atexit.register(lambda: print('\\n' + json.dumps(tops())))\n" + statement
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import perdure",
        "import perdure; perdure.JobSpec",
        "from perdure.launchers.cli import main; main(['--help'])",
        "from perdure.launchers.cli import main; main(['run', '--help'])",
        "import perdure.runtime.warden, perdure.runtime.agent",
        "import perdure.runtime.driver",
    ],
)
@pytest.mark.slow
def test_light_modules_stay_light(statement: str) -> None:
    assert loaded_after(statement) & set(HEAVY) == set()


@pytest.mark.slow
def test_a_heavy_import_would_be_seen() -> None:
    assert "rich" in loaded_after("import rich")


@pytest.mark.parametrize("module", ["runtime.session", "checkpoint.api"])
@pytest.mark.slow
def test_a_rank_never_loads_the_launchers(module: str) -> None:
    assert "ray" not in loaded_after(f"import perdure.{module}")
