"""Watching a job that lives elsewhere: `run` on a cluster, `resume` there, `events -f`.

A watcher owns nothing. When its terminal goes, the job goes on; Ctrl-C asks the job to stop, a
second Ctrl-C only leaves. A controller that dies is replaced by its cluster, so a broken connection
is redialled for a while before the journal is asked how it ended.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence

from perdure.launchers.display import Display, face_for
from perdure.launchers.runs import Found, connect, find, open_run
from perdure.launchers.view import Json, text_of, whole_of
from perdure.runtime.errors import RunProblem, WireError

AWAY_S = 60.0  # a controller that was killed is back long before
POLL_S = 1.0
INTERRUPTED = 130


def turns(found: Found) -> Iterator[tuple[Json, Sequence[Json]]]:
    """(status, new lines) until the run has ended; over the controller's death and return."""
    away_since: float | None = None
    while True:
        client = connect(found)
        if client is not None:
            away_since = None
            try:
                for status, lines in client.watch():
                    yield status, lines
                    if text_of(status, "phase") == "finished":
                        return
            except (WireError, OSError):
                away_since = time.monotonic()
            finally:
                client.close()
        away_since = time.monotonic() if away_since is None else away_since
        ended = _ended(found)
        if ended is not None:
            yield ended, []
            return
        if time.monotonic() - away_since > AWAY_S:
            raise RunProblem(
                f"the controller of {found.run} has not answered for {AWAY_S:.0f} s",
                hint=f"its cluster may be gone: perdure why {found.run}, then perdure resume "
                f"{found.run}",
            )
        time.sleep(POLL_S)


def _ended(found: Found) -> Json | None:
    from perdure.runtime import journal

    view = journal.read(open_run(found))
    if view.finished is None:
        return None
    code, because = view.finished
    status = dict(view.status or {"run": found.run})
    return {**status, "phase": "finished", "exit_code": code, "because": because}


def watch(run: str, *, as_json: bool) -> int:
    found = find(run)
    display = Display(face_for(as_json=as_json))
    asked = 0

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        while True:
            try:
                for status, lines in turns(found):
                    display(status, lines)
                    code = whole_of(status, "exit_code")
                    if text_of(status, "phase") == "finished" and code is not None:
                        return code
                return 0
            except KeyboardInterrupt:
                asked += 1
                if asked > 1 or not _ask_stop(found):
                    return INTERRUPTED
                note = "asked the job to stop; Ctrl-C again leaves it and only detaches"
                display(display.status, [{"kind": "note", "at": time.time(), "text": note}])
    finally:
        signal.signal(signal.SIGINT, before)
        display.close()


def _ask_stop(found: Found) -> bool:
    client = connect(found)
    if client is None:
        return False
    try:
        client.stop(by="Ctrl-C", exit_code=INTERRUPTED, at_once=False)
    except (WireError, OSError):
        return False
    finally:
        client.close()
    return True
