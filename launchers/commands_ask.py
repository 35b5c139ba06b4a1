"""status, why, events: what a run does and did, from its controller or from its folder.

The controller is asked when it answers; else the journal in the store tells what was so when it was
last written, and how long ago that is. Nothing here changes anything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from perdure.launchers.options import Given
from perdure.launchers.runs import Found, connect, find, open_run
from perdure.launchers.view import (
    Json,
    RunView,
    count,
    number_of,
    objects_of,
    rate,
    span,
    text_of,
    whole_span,
)
from perdure.launchers.words import SILENT, Tale, blamed, sentence, story, time_of
from perdure.runtime.errors import WireError

ALIVE_S = 30.0  # a living run's journal moves at least this often


def status(given: Given) -> int:
    if given.target is None:
        return _list(given)
    found = find(given.target)
    raw = status_of(found)
    if given.flag("json"):
        print(json.dumps(raw))
    else:
        print("\n".join(told(RunView.read(raw), raw, time.time())))
    return 0


def status_of(found: Found) -> Json:
    """The status object; `source` is "controller" or "journal", `alive` what that means."""
    live = _live(found)
    if live is not None:
        return {**live, "source": "controller", "alive": text_of(live, "phase") != "finished"}
    from perdure.runtime import journal

    view = journal.read(open_run(found))
    raw: dict[str, object] = {"run": found.run, **(view.status or {"phase": "new"})}
    if view.finished is not None:
        raw.update(phase="finished", exit_code=view.finished[0], because=view.finished[1])
    moved = view.last_at is not None and time.time() - view.last_at < ALIVE_S
    raw.update(source="journal", at=view.last_at, alive=moved and view.finished is None)
    if view.problems:
        raw["problems"] = list(view.problems)
    return raw


def _live(found: Found) -> Json | None:
    client = connect(found)
    if client is None:
        return None
    try:
        return client.status()
    except (WireError, OSError):
        return None
    finally:
        client.close()


def told(view: RunView, raw: Json, now_s: float) -> list[str]:
    """`perdure status RUN` for people."""
    step = f"step {view.step:,}" + (f" of {view.total_steps:,}" if view.total_steps else "")
    if view.fraction is not None:
        step += f" ({view.fraction:.1%})"
    pace = [rate(view.steps_per_s)] if view.steps_per_s and view.phase == "running" else []
    if view.left_s is not None:
        pace.append(f"{whole_span(view.left_s)} left")
    if view.loss is not None:
        pace.append(f"loss {view.loss:.4g}")
    rows = [("run", view.run), ("phase", view.phase + _why(view, raw, now_s))]
    if view.attempt:
        again = f", {count(view.restarts, 'restart')}" if view.restarts else ""
        rows.append(("attempt", view.attempt + again))
    rows.append(("progress", ", ".join([step, *pace])))
    if view.nodes:
        where = f"{count(view.world_size, 'rank')} on {', '.join(view.nodes)}"
        rows.append(("ranks", where + (f"; spare: {', '.join(view.spares)}" * bool(view.spares))))
    if view.checkpoint_step is None:
        rows.append(("checkpoint", "none yet"))
    else:
        age = (
            f", {whole_span(max(0.0, now_s - view.checkpoint_at_s))} ago"
            if view.checkpoint_at_s
            else ""
        )
        tier = f" in {view.checkpoint_tier}" if view.checkpoint_tier else ""
        rows.append(("checkpoint", f"step {view.checkpoint_step:,}{tier}{age}"))
    for fault in view.faults[-5:]:
        rows.append(("fault", f"{time_of(fault.at_s)}  {fault.because} [blame: {blamed(fault)}]"))
    for problem in raw.get("problems") or ():  # type: ignore[attr-defined]
        rows.append(("damaged", str(problem)))
    return [f"{name:<11} {text}" for name, text in rows]


def _why(view: RunView, raw: Json, now_s: float) -> str:
    reason = "" if view.phase == "running" else view.waiting_for or view.because
    said = f" ({reason})" if reason else ""
    if view.exit_code is not None:
        said = f", exit code {view.exit_code}{said}"
    elif text_of(raw, "source") == "journal":
        at = number_of(raw, "at")
        ago = f"{span(now_s - at)} ago" if at is not None else "never"
        said += f"; its controller does not answer from here, its journal was written {ago}"
        if raw.get("alive") is False:
            said += f": it is dead, go on with `perdure resume {view.run}`"
    return said


def _list(given: Given) -> int:
    from perdure.launchers import records

    found = [Found(one.run, one.url, one) for one in records.list_runs()]
    rows = []
    for one in found:
        live = _live(one)
        rows.append(live if live is not None else _from_folder(one))
    if given.flag("json"):
        print(json.dumps({"runs": rows}))
        return 0
    if not rows:
        print("no run was started on this machine")
    width = max((len(text_of(row, "run")) for row in rows), default=0)
    for row in rows:
        view = RunView.read(row)
        code = f" (exit code {view.exit_code})" if view.exit_code is not None else ""
        print(f"{view.run:<{width}}  {view.phase + code:<24}  step {view.step:,}")
    return 0


def _from_folder(found: Found) -> Json:
    """A row of the list must not fail because one run's folder is gone."""
    from perdure.runtime.errors import RunProblem, StoreProblem

    try:
        return status_of(found)
    except (RunProblem, StoreProblem) as problem:
        return {"run": found.run, "phase": "unreadable", "because": str(problem)}


def tale_of(found: Found) -> tuple[Tale, list[str]]:
    from perdure.runtime import journal

    view = journal.read(open_run(found))
    tale = Tale()
    for line in view.events():
        tale.add(line)
    tale.add_faults(objects_of(view.state or {}, "faults"))
    tale.add_faults(objects_of(view.status or {}, "faults"))
    live = _live(found)
    if live is not None:
        tale.add_faults(objects_of(live, "faults"))
    return tale, list(view.problems)


def why(given: Given) -> int:
    found = find(given.target)
    tale, problems = tale_of(found)
    if given.flag("json"):
        print(json.dumps({"run": found.run, **_facts(tale), "problems": problems}))
        return 0
    print(f"run {found.run} ({found.url})")
    print("\n".join([*story(tale), *(f"damaged: {problem}" for problem in problems)]))
    return 0


def _facts(tale: Tale) -> dict[str, object]:
    faults = []
    for fault in sorted(tale.faults.values(), key=lambda one: one.at_s):
        answer = tale.after(fault)
        before = tale.during(fault)
        running = answer.running_at_s if answer is not None else None
        faults.append(
            {
                "at": fault.at_s,
                "kind": fault.kind,
                "blame": fault.blame,
                "rank": fault.rank,
                "node": fault.node,
                "because": fault.because,
                "attempt": before.attempt if before is not None else None,
                "next_attempt": answer.attempt if answer is not None else None,
                "took_s": running - fault.at_s if running is not None else None,
            }
        )
    end = tale.finished
    return {
        "faults": faults,
        "finished": None if end is None else {"at": end[0], "exit_code": end[1], "because": end[2]},
    }


def events(given: Given) -> int:
    found = find(given.target)
    for line in _lines(found, follow=given.flag("follow")):
        if given.flag("json"):
            print(json.dumps(line), flush=True)
        elif text := sentence(line):
            print(f"{time_of(number_of(line, 'at') or 0.0)}  {text}", flush=True)
    return 0


def _lines(found: Found, *, follow: bool) -> Iterator[Json]:
    """The journal to its end; then, followed, each new segment as it comes (1 s behind at most)."""
    from perdure.runtime import journal

    store = open_run(found)
    seen = ""
    while True:
        view = journal.read(store)
        for line in view.events(after=seen):
            if text_of(line, "kind") not in SILENT:
                yield line
        seen = view.segments[-1] if view.segments else seen
        if not follow or view.finished is not None:
            return
        time.sleep(0.5)
