"""`pytest tests/unit/core --rewrite-scenarios` writes what the core says now into tests/scenarios.

Inspect the difference; commit only what you understand.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-scenarios", action="store_true", help="accept today's transcripts")
