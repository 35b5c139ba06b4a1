"""Journal lines as sentences, and a whole journal as the story of its faults.

`perdure events`, `perdure why` and the plain display say the same thing in the same words, because
all of them ask here. Reasons come from the core (`because`) and are passed on as they are: this
module never invents a cause. A line of a kind that it does not know is told by its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from perdure.launchers.view import (
    Fault,
    Json,
    count,
    number_of,
    object_of,
    objects_of,
    span,
    text_of,
    texts_of,
    whole_of,
)

# Snapshots and signs of life: for machines, and for `Tale`.
SILENT = frozenset({"state", "alive", "beats_seen", "tick"})


def sentence(line: Json) -> str:
    """One journal line in words; '' for one that people need not see."""
    kind = text_of(line, "kind")
    because = text_of(line, "because")
    if kind in SILENT:
        return ""
    teller = _TELLERS.get(kind)
    if teller is not None:
        return teller(line)
    rest = ", ".join(
        f"{key} {value}"
        for key, value in line.items()
        if key not in {"kind", "at", "because"} and not isinstance(value, Mapping | list)
    )
    return kind.replace("_", " ") + f" ({rest})" * bool(rest) + f": {because}" * bool(because)


def members_of(line: Json) -> list[tuple[str, int, int]]:
    """(node, first rank, ranks) of a launch; a member is [node, group_rank, first_rank, nproc]."""
    raw = line.get("members")
    found: list[tuple[str, int, int]] = []
    for item in raw if isinstance(raw, list) else []:
        match item:
            case [str(node), int(), int(first), int(nproc)]:
                found.append((node, first, nproc))
    return found


def point_of(raw: Json | None) -> str:
    return "the beginning" if raw is None else f"step {whole_of(raw, 'step'):,}"


def _launch(line: Json) -> str:
    members = members_of(line)
    ranks = sum(nproc for _, _, nproc in members)
    return (
        f"attempt {text_of(line, 'attempt')}: start {count(ranks, 'rank')} on "
        f"{', '.join(node for node, _, _ in members)} from {point_of(object_of(line, 'restore'))}"
        f" ({text_of(line, 'because')})"
    )


def ended(report: Json) -> str:
    """'rank 1 on n1 was ended by signal 9 (SIGKILL)', with the error where there is one."""
    import signal

    who = f"rank {whole_of(report, 'rank')} on {text_of(report, 'node')}"
    number = whole_of(report, "signal")
    if report.get("oom") is True:
        return f"{who} was ended by the kernel for want of memory"
    if number is not None:
        try:
            name = f" ({signal.Signals(number).name})"
        except ValueError:
            name = ""
        by = ", as told" if report.get("by_us") is True else ""
        return f"{who} was ended by signal {number}{name}{by}"
    code = whole_of(report, "exit_code")
    if code == 0:
        return f"{who} has finished"
    error, where = text_of(report, "error"), text_of(report, "where")
    return (
        f"{who} ended with exit code {code}"
        + f": {error}" * bool(error)
        + (f" ({where})" if where else "")
    )


def _offered(line: Json) -> str:
    raw = line.get("nodes")
    names = [str(item[0]) for item in raw if item] if isinstance(raw, list) else []
    waiting = text_of(line, "waiting_for")
    return f"nodes ready: {', '.join(names) or 'none'}" + f"; waiting: {waiting}" * bool(waiting)


def _stop_gang(line: Json) -> str:
    grace = number_of(line, "grace_s") or 0.0
    how = f"within {span(grace)}" if grace else "at once"
    return (
        f"attempt {text_of(line, 'attempt')}: end its ranks on "
        f"{', '.join(texts_of(line, 'nodes'))} {how} ({text_of(line, 'because')})"
    )


def _finish(line: Json) -> str:
    return f"the job ends with exit code {whole_of(line, 'exit_code')}: {text_of(line, 'because')}"


_TELLERS: dict[str, Callable[[Json], str]] = {
    "started": lambda line: (
        f"controller started for `{text_of(line, 'by')}`, term {whole_of(line, 'term')}"
    ),
    "took_over": lambda line: (
        f"a new controller took over, term {whole_of(line, 'term')}; "
        f"{count(len(objects_of(line, 'answers')), 'agent')} answered"
    ),
    "nodes_offered": _offered,
    "gang_started": lambda line: (
        f"attempt {text_of(line, 'attempt')}: ranks started on {text_of(line, 'node')}"
    ),
    "gang_stopped": lambda line: (
        f"attempt {text_of(line, 'attempt')}: nothing of it is left on {text_of(line, 'node')}"
    ),
    "rank_exited": lambda line: ended(object_of(line, "report") or {}),
    "node_lost": lambda line: f"node {text_of(line, 'node')} is lost: {text_of(line, 'why')}",
    "checkpoint_committed": lambda line: (
        f"checkpoint of step {whole_of(line, 'step'):,} is "
        + ("in memory on every node" if text_of(line, "tier") == "memory" else "committed")
    ),
    "restore_failed": lambda line: (
        f"rank {whole_of(line, 'rank')} could not restore "
        f"{point_of(object_of(line, 'point'))}: {text_of(line, 'why')}"
    ),
    "save_asked": lambda line: f"{text_of(line, 'by')} asks for a save",
    "stop_asked": lambda line: (
        f"{text_of(line, 'by')} asks for a stop"
        + (" at once" if line.get("at_once") is True else "")
    ),
    "command_failed": lambda line: (
        f"{text_of(line, 'command').replace('_', ' ')} failed"
        + (f" on {text_of(line, 'node')}" if text_of(line, "node") else "")
        + f": {text_of(line, 'why')}"
    ),
    "request_nodes": lambda line: (
        f"ask the cluster for {count(whole_of(line, 'count') or 0, 'node')}"
        + (f", not {', '.join(texts_of(line, 'exclude'))}" if texts_of(line, "exclude") else "")
        + f" ({text_of(line, 'because')})"
    ),
    "launch_gang": _launch,
    "stop_gang": _stop_gang,
    "save_now": lambda line: (
        f"attempt {text_of(line, 'attempt')}: save at the next common step "
        f"({text_of(line, 'because')})"
    ),
    "mark_bad": lambda line: (
        f"checkpoint of {point_of(object_of(line, 'point'))} is marked bad: "
        f"{text_of(line, 'because')}"
    ),
    "finish": _finish,
    "note": lambda line: text_of(line, "text"),
    "damaged": lambda line: f"{text_of(line, 'key')} cannot be read: {text_of(line, 'because')}",
    "lost_lines": lambda line: (
        f"{whole_of(line, 'count')} lines were lost while the store was away"
    ),
}


@dataclass(slots=True)
class Launch:
    attempt: str
    at_s: float
    members: list[tuple[str, int, int]]
    restore: str
    because: str
    started_on: set[str] = field(default_factory=set)
    running_at_s: float | None = None  # when the last member had started

    def log_of(self, rank: int) -> tuple[str, str] | None:
        """(`attempt_<n>/<local rank>`, node): torchrun's layout below <log_dir>/<run>."""
        for node, first, nproc in self.members:
            if first <= rank < first + nproc:
                return f"attempt_{int(self.attempt.rpartition('.')[2]) - 1}/{rank - first}", node
        return None


@dataclass(slots=True)
class Tale:
    """A journal folded: launches, faults (as the core judged them), exits, commits, the end."""

    launches: list[Launch] = field(default_factory=list)
    faults: dict[tuple[float, str, str], Fault] = field(default_factory=dict)
    exits: dict[str, list[Json]] = field(default_factory=dict)
    commits: list[tuple[float, int]] = field(default_factory=list)
    began_at_s: float | None = None
    last_at_s: float = 0.0
    finished: tuple[float, int, str] | None = None
    takeovers: int = 0

    def add(self, line: Json) -> None:
        kind, at = text_of(line, "kind"), number_of(line, "at") or 0.0
        self.last_at_s = max(self.last_at_s, at)
        if kind == "state":
            self.add_faults(objects_of(object_of(line, "core") or {}, "faults"))
        elif kind == "alive":
            self.add_faults(objects_of(object_of(line, "status") or {}, "faults"))
        elif kind == "started":
            self.began_at_s = at if self.began_at_s is None else self.began_at_s
            self.finished = None  # a resume: the story goes on
        elif kind == "took_over":
            self.takeovers += 1
        elif kind == "launch_gang":
            self.launches.append(
                Launch(
                    text_of(line, "attempt"),
                    at,
                    members_of(line),
                    point_of(object_of(line, "restore")),
                    text_of(line, "because"),
                )
            )
        elif kind == "gang_started" and self.launches:
            self._started(text_of(line, "attempt"), text_of(line, "node"), at)
        elif kind == "rank_exited" and (report := object_of(line, "report")) is not None:
            self.exits.setdefault(text_of(line, "attempt"), []).append(report)
        elif kind == "checkpoint_committed":
            self.commits.append((at, whole_of(line, "step") or 0))
        elif kind == "finish":
            self.finished = (at, whole_of(line, "exit_code") or 0, text_of(line, "because"))

    def add_faults(self, raw: Iterable[Json]) -> None:
        for item in raw:
            fault = Fault.read(item)
            self.faults[fault.at_s, fault.kind, fault.because] = fault

    def _started(self, attempt: str, node: str, at_s: float) -> None:
        launch = next((one for one in self.launches if one.attempt == attempt), None)
        if launch is not None:
            launch.started_on.add(node)
            if launch.started_on >= {name for name, _, _ in launch.members}:
                launch.running_at_s = at_s

    def after(self, fault: Fault) -> Launch | None:
        """The launch that answered this fault: the first one that came later."""
        return next((one for one in self.launches if one.at_s >= fault.at_s), None)

    def during(self, fault: Fault) -> Launch | None:
        """The attempt that the fault ended: the last one launched before it."""
        before = [one for one in self.launches if one.at_s < fault.at_s]
        return before[-1] if before else None


def story(tale: Tale) -> list[str]:
    """`perdure why`: each fault, whose it was, the evidence, what was done, how long it took."""
    said: list[str] = []
    faults = sorted(tale.faults.values(), key=lambda fault: fault.at_s)
    for number, fault in enumerate(faults, 1):
        said += [f"{number}. {time_of(fault.at_s)}  {fault.because}", f"   blame: {blamed(fault)}"]
        said += _evidence(tale, fault)
        answer = tale.after(fault)
        if answer is not None:
            took = answer.running_at_s
            said.append(
                f"   done:  attempt {answer.attempt} on "
                f"{', '.join(node for node, _, _ in answer.members)} from {answer.restore}"
                + (f", running after {span(took - fault.at_s)}" if took is not None else "")
            )
    if not faults:
        said.append("no fault was seen")
    if tale.takeovers:
        said.append(f"the controller was replaced {count(tale.takeovers, 'time')}")
    if tale.finished is not None:
        at, code, because = tale.finished
        said.append(f"end: {time_of(at)}  exit code {code}: {because}")
    return said


def _evidence(tale: Tale, fault: Fault) -> list[str]:
    attempt = tale.during(fault)
    if attempt is None:
        return []
    said = [
        f"   also:  {ended(report)}"
        for report in tale.exits.get(attempt.attempt, [])
        if report.get("by_us") is not True
        and whole_of(report, "exit_code") != 0
        and whole_of(report, "rank") != fault.rank  # the fault itself says how that one ended
    ]
    return [*said[:4], *([f"   also:  {len(said) - 4} more ranks"] if len(said) > 4 else [])]


_BLAMES = {
    "user": "the script",
    "out_of_memory": "the script's need of memory",
    "device": "a device",
    "node": "the node",
    "network": "the network",
    "storage": "storage",
    "preemption": "somebody who ended it from outside",
    "unknown": "unknown, the evidence does not say",
}


def blamed(fault: Fault) -> str:
    return _BLAMES.get(fault.blame, fault.blame)


def time_of(at_s: float) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
