"""`python -m perdure.runtime.simulate --seeds 1000`: random faults against the core that decides.

Exit code 0: every seed held. 1: one did not; its seed and reason are printed, and the same seed
fails again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter

from perdure.runtime.errors import InvariantBroken
from perdure.runtime.simulate.checks import Violation
from perdure.runtime.simulate.faults import EFFECTS, KINDS
from perdure.runtime.simulate.run import Outcome, run_seed

ALL_FIRE_FROM = 500  # seeds: below this a rare kind may honestly not have come up


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    first, count = options.seed, options.seeds
    if not options.json:
        print(f"seeds {first} .. {first + count - 1}", flush=True)
    outcomes: list[Outcome] = []
    failed: list[tuple[int, str]] = []
    begun = time.perf_counter()
    for seed in range(first, first + count):
        try:
            outcomes.append(run_seed(seed, options.nodes, options.trace))
        except (Violation, InvariantBroken) as error:
            failed.append((seed, f"{type(error).__name__}: {error}"))
            if not options.json:
                print(f"seed {seed}: {failed[-1][1]}", flush=True)
    took_s = time.perf_counter() - begun
    fired: Counter[str] = sum((o.fired for o in outcomes), Counter())
    silent = [kind for kind in (*KINDS, *EFFECTS) if not fired[kind]]
    ok = not failed and not (silent and count >= ALL_FIRE_FROM and options.nodes is None)
    if options.json:
        print(json.dumps(summary(first, outcomes, ok, took_s)))
    else:
        _print(outcomes, failed, fired, silent, took_s)
    return 0 if ok else 1


def summary(seed: int, outcomes: list[Outcome], ok: bool, took_s: float) -> dict[str, object]:
    """DESIGN part 6: {ettr, loss, events_per_s, invariants_ok, seed}."""
    wall = sum(o.virtual_s for o in outcomes) or 1.0
    loss: Counter[str] = Counter()
    for outcome in outcomes:
        loss.update(outcome.lost_s)
    return {
        "ettr": round(sum(o.productive_s for o in outcomes) / wall, 4),
        "loss": {kind: round(s / wall, 4) for kind, s in sorted(loss.items())},
        "events_per_s": round(sum(o.events for o in outcomes) / took_s) if took_s else 0,
        "invariants_ok": ok,
        "seed": seed,
    }


def _print(
    outcomes: list[Outcome],
    failed: list[tuple[int, str]],
    fired: Counter[str],
    silent: list[str],
    took_s: float,
) -> None:
    codes = Counter(o.exit_code for o in outcomes)
    print(f"{len(outcomes)} seeds held, {len(failed)} did not, in {took_s:.1f} s")
    print("exit codes:", ", ".join(f"{code}: {n}" for code, n in sorted(codes.items())))
    print(
        "attempts:", sum(o.attempts for o in outcomes), "events:", sum(o.events for o in outcomes)
    )
    print("fired:", ", ".join(f"{kind} {n}" for kind, n in sorted(fired.items())))
    if silent:
        print("never fired:", ", ".join(silent))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="perdure simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many (100)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (0)")
    parser.add_argument("--nodes", type=int, default=None, help="size of the gang (drawn)")
    parser.add_argument("--trace", action="store_true", help="print every command")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
