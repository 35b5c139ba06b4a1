"""How the ranks of a gang without an agent agree on an attempt and a restore point.

Under an agent the controller decides and the environment says it. Under torchrun or plain python
rank 0's uploader plays that part through the store, without a collective: a rank may ask at any
time, also before (or without) a process group.

torchrun tells all ranks the same few values (run id, master address and port, restart count), but
with a fixed port the next launch of the same command gets the same ones; an answer found under them
could be that of yesterday. So every rank asks under a name of its own, made fresh, below a folder
named by those values, and waits for the answer to *its* question:

    checkpoints/meet/<digest of the values>/ask-<rank>-<uuid>       put by ranks 1 and up
    checkpoints/meet/<digest of the values>/answer-<uuid>           put by rank 0's uploader

Rank 0 answers whoever asks: a question left by a dead launch is answered too, and read by nobody.
Such a one may stand in for a rank that has yet to come, so it goes on looking for QUIET_S after
every rank seems to be answered, ever more seldom.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from typing import Any

from perdure.checkpoint import lineage
from perdure.checkpoint.errors import KeyExists, KeyMissing, StoreError
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.store import Store

ANSWER_WAIT_S = 300.0  # rank 0 may still be importing, building its model, downloading
QUIET_S = 600.0
_LOOK_S_MIN, _LOOK_S_MAX, _SELDOM_S = 0.05, 1.0, 30.0


Decision = dict[str, Any]  # {"attempt": "1.4", "restore": {"step", "attempt"} or None}


def decide(store: Store, *, restore: bool, step: int | None) -> Decision:
    """Rank 0's decision: the attempt to write under, and the point that all ranks restore.

    With `restore` the run's newest good commit, or that of `step`; without it none: a script that
    saves before it ever restored starts afresh. What is complete but not committed (a process died
    in between) is committed first. Raises StateError when there is no commit of `step`, or when there
    are commits and none of them is fit to be restored.
    """
    lineage.commit_complete(store)
    history = lineage.read_history(store)
    point: Point | None = None
    if restore and step is not None:
        point = lineage.commit_at(history, step).point
    elif restore and (line := lineage.restorable(history)):
        point = line[0].point
    record = lineage.take_attempt(store, point)
    return {"attempt": record.attempt, "restore": point._asdict() if point else None}


def ask(store: Store, meeting: str, rank: int) -> Decision:
    """What rank 0 decided. Raises StoreError when it says nothing within ANSWER_WAIT_S."""
    name = uuid.uuid4().hex
    folder = f"checkpoints/meet/{meeting}"
    store.put(f"{folder}/ask-{rank}-{name}", b"?", create=True)
    deadline, pause_s = time.monotonic() + ANSWER_WAIT_S, _LOOK_S_MIN
    while time.monotonic() < deadline:
        try:
            answer: Decision = json.loads(store.get(f"{folder}/answer-{name}"))
        except KeyMissing:
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LOOK_S_MAX)
        else:
            store.delete(f"{folder}/answer-{name}")
            return answer
    store.delete(f"{folder}/ask-{rank}-{name}")
    raise StoreError(
        f"rank 0 said within {ANSWER_WAIT_S:.0f} s neither what attempt this is nor what to restore",
        hint="make the Checkpointer on every rank with one URL; is rank 0 alive, and does it see "
        "the same store?",
    )


def answer_all(store: Store, meeting: str, decision: Decision, ranks: int) -> None:
    """Answer ranks 1 to `ranks` - 1, in the background, for as long as one may come."""
    threading.Thread(
        target=_answer, args=(store, meeting, decision, ranks), name="meeting", daemon=True
    ).start()


def _answer(store: Store, meeting: str, decision: Decision, ranks: int) -> None:
    folder = f"checkpoints/meet/{meeting}"
    answered: set[int] = set()
    pause_s, heard = _LOOK_S_MIN, time.monotonic()
    while len(answered) < ranks - 1 or time.monotonic() < heard + QUIET_S:
        try:
            asked = [e.key for e in store.list(folder) if e.key.startswith(f"{folder}/ask-")]
            for key in asked:
                _, rank, name = key.removeprefix(f"{folder}/").split("-")
                _answer_one(store, f"{folder}/answer-{name}", decision)
                store.delete(key)
                answered.add(int(rank))
        except StoreError:
            asked = []  # the asking rank waits; the store may be back when we look again
        if asked:
            pause_s, heard = _LOOK_S_MIN, time.monotonic()
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _LOOK_S_MAX if len(answered) < ranks - 1 else _SELDOM_S)


def _answer_one(store: Store, key: str, decision: Decision) -> None:
    try:
        store.put(key, json.dumps(decision).encode(), create=True)
    except KeyExists:
        return  # a retry of our own put whose first answer got lost
