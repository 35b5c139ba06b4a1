"""The law of the core, and its phases as a table.

Who decides what
  Only `Core.step` changes anything. A phase changes only along a row of TABLE; anything else is a
  broken invariant, never a quiet surprise. An event that does not fit (an older attempt, a node that
  is not ours, an answer that nobody waits for) changes nothing.

One gang
  A gang is launched only when no process of an earlier one can make another step. Each node of the
  earlier gang has answered GangStopped, or its agent is dead (its children die with it), or it was
  silent for takeover_s, when its own lease has ended it at fence_s. A node that answers beats but
  not a command within its time is given up too: it is excluded (the driver answers its beats no
  more), and the next launch is held for takeover_s, so that its lease has run out.
  A gang that falls silent as a whole is another matter: cut off together, its agents are a majority
  to each other and train on for orphan_grace_s. Then the next launch waits until that has passed,
  or until one of them answers a stop or is known to be dead: a step needs every rank. (A gang of
  one node has no majority to ask.)
  A node that was lost may come back with processes of ours: it is told to stop them and is used only
  when it has answered.

Who is lost, who is excluded
  An agent that died says nothing about its machine: the node may be used again, after all others.
  A node that fell silent, or does not answer, is excluded from requests for EXCLUDE_S, so that the
  cluster puts another in its place; not for ever, since silence is no verdict, and on a small
  cluster there may be no other. Nodes that are missing from an offer are not lost by that: a broken
  connection is redialled. On a takeover, a member that gives no answer is lost: the driver has
  waited takeover_s for those that do not refuse.

Places
  A node of the last gang keeps its group rank while it lives. Free places go to the nodes that
  failed us least often, by name among equals. A node that could not start its ranks keeps its place
  only if there is no other.

Why it ended
  The cause is judged when the gang has stopped, from all that is known by then: the first report is
  often a victim's. A failed restore, then a lost node, the out-of-memory killer or a signal that is
  not ours, outrank a failed start, that an exception, that a complaint about a lost connection, that
  an end which we brought about. Among equals the earliest counts.

Restart or end
  Always: at most budget.restarts within budget.window_s, then 93. With --max-restarts: that many
  restarts for ends blamed on the user, on memory, or on nothing known; then the script's own exit
  code. Always: budget.no_progress_attempts ends in a row with one signature, no newer commit and
  fewer than no_progress_steps steps beyond the furthest that any attempt had come to are no
  progress: 93. (Beyond the furthest, not since the restore: a script that fails each time at step
  480, with its last commit at 400, gains nothing by the 80 steps that it makes again.) Ends by node,
  network, device, storage or preemption, and signals from outside, neither count nor clear the row.

Checkpoints
  The restore point is the newest commit on the line. It moves back only past a commit marked bad, or
  by a person's word. A commit of the newest attempt counts until the next launch, also while the gang
  is being stopped; after it, a commit of an older attempt lies off the line, unless it is older than
  what was restored. Where every commit is bad, the job ends with 2: to start again from nothing
  would throw away all work without a word, and that is for a person to say.
  A commit in memory alone does not move the restore point.

Stops
  A stop that a person or a scheduler asks for first waits, at most stop_grace_s, for one save if the
  script takes orders to save; then SIGTERM, stop_grace_s, SIGKILL. Asked twice, or at once: SIGKILL.
  If all ranks end with 0 before they are told to stop, the job has finished. A stop that is asked
  during a recovery ends the recovery.
"""

from __future__ import annotations

from perdure.runtime.core.state import Phase

EXCLUDE_S = 60.0  # six takeovers: enough for a cluster to end a frozen agent and find another node

TABLE: dict[Phase, dict[Phase, str]] = {
    "new": {
        "waiting": "the run starts, or is taken over with no gang",
        "running": "taken over: every member runs the newest attempt",
        "stopping": "taken over: the gang is not whole",
        "finished": "a stop is asked before the start",
    },
    "waiting": {
        "launching": "enough nodes are usable",
        "running": "taken over: an attempt that the journal does not know runs whole",
        "stopping": "taken over: an attempt that the journal does not know is not whole",
        "finished": "no place in time, no commit that can be read, or a stop is asked",
    },
    "launching": {
        "running": "every member has started",
        "stopping": "a rank ended, a node is lost or did not start in time, or a stop is asked",
        "finished": "every rank ended with 0",
    },
    "running": {
        "saving": "a stop is asked and the script can save first",
        "stopping": "a rank ended, a node is lost, a restore failed, or a stop is asked",
        "finished": "every rank ended with 0",
    },
    "saving": {
        "running": "taken over: every member runs the newest attempt",
        "stopping": "the save is committed, or too late, or the gang broke",
        "finished": "every rank ended with 0",
    },
    "stopping": {
        "waiting": "every living member has stopped, and the job goes on",
        "running": "taken over: every member runs the newest attempt",
        "finished": "every living member has stopped, and the job ends",
    },
    "finished": {},
}
