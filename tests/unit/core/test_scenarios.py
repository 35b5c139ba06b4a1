"""The core's behaviour as transcripts: what it was told, what it said, and why each one exists."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCENARIOS = sorted((HERE.parents[1] / "scenarios").glob("*.txt"))

_spec = importlib.util.spec_from_file_location("transcript", HERE / "transcript.py")
assert _spec is not None and _spec.loader is not None
transcript = importlib.util.module_from_spec(_spec)
sys.modules["transcript"] = transcript
_spec.loader.exec_module(transcript)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: str(path.stem))
def test_scenario(path: Path, request: pytest.FixtureRequest) -> None:
    written = path.read_text()
    assert written.startswith("# "), "a scenario begins by saying why it exists"
    said = transcript.play(written)
    if request.config.getoption("--rewrite-scenarios", default=False):
        path.write_text(said)
    assert said == written, "inspect, then accept with --rewrite-scenarios"


def test_every_rule_has_its_scenario() -> None:
    assert len(SCENARIOS) >= 20


def test_a_changed_answer_is_noticed() -> None:
    text = SCENARIOS[0].read_text()
    assert transcript.play(text.replace("count=", "count=9")) != text.replace("count=", "count=9")
