"""docs/core.md shows the table that the core runs by: `--rewrite-scenarios` draws it anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.runtime.core.table import TABLE

PAGE = Path(__file__).resolve().parents[3] / "docs" / "core.md"
BEGIN, END = "<!-- table: drawn from runtime/core/table.py -->\n", "<!-- end of table -->\n"


def render() -> str:
    rows = ["| from | to | when |", "|---|---|---|"]
    for source, targets in TABLE.items():
        rows += [f"| {source} | {target} | {when} |" for target, when in targets.items()]
    return "\n".join(rows) + "\n"


def test_the_page_shows_the_table(request: pytest.FixtureRequest) -> None:
    page = PAGE.read_text()
    head, rest = page.split(BEGIN)
    shown, tail = rest.split(END)
    if request.config.getoption("--rewrite-scenarios", default=False):
        PAGE.write_text(f"{head}{BEGIN}{render()}{END}{tail}")
    assert shown == render(), "accept with --rewrite-scenarios"
