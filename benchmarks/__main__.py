"""`python -m perdure.benchmarks`: every figure that the README names, each beside its peer.

One after the other, never at once: they would measure each other. `--only NAME` picks some.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from perdure.benchmarks import core_events, node_loss, overhead, recovery, soak, start
from perdure.benchmarks.common import Row, options, report

ALL: dict[str, tuple[Callable[[int], list[Row]], int]] = {
    "recovery": (recovery.measure, 10),
    "start": (start.measure, 7),
    "node_loss": (node_loss.measure, 3),
    "soak": (soak.measure, 20),
    "overhead": (overhead.measure, 1),
    "core_events": (core_events.measure, 5),
}


def main() -> None:
    parser = options("every benchmark, beside its peer", 0)
    parser.add_argument("--only", action="append", choices=sorted(ALL), help="this one; repeatable")
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.only or ALL:
        measure, runs = ALL[name]
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += measure(args.runs or runs)
    report(rows, as_json=args.json)


if __name__ == "__main__":
    main()
