"""What becomes of the options of torchrun that perdure does not take over one to one.

Each is accepted where leaving it out changes nothing that the script can see (and a note says so),
or refused with what to do instead. None is ever silently ignored: a launcher that swallows an option
runs another job than the one that was asked for. A test reads torchrun's own parser and fails when
it has an option that is in neither list.
"""

from __future__ import annotations

from collections.abc import Callable

from perdure.launchers.options import Given
from perdure.runtime.errors import UsageError

_RANKS = "perdure assigns ranks itself and opens a fresh rendezvous for each attempt"

# dest -> why it may be left out
ACCEPTED: dict[str, str] = {
    "standalone": "a run on one machine always is",
    "rdzv_backend": _RANKS,
    "rdzv_endpoint": _RANKS,
    "rdzv_id": "the run id takes its place (--name sets it)",
    "rdzv_conf": _RANKS,
    "monitor_interval": "the death of a rank is seen at once, not by polling",
    "start_method": "it concerns functions, and perdure starts scripts",
    "run_path": "a script shares its interpreter with nothing but its own process anyway",
    "master_addr": "MASTER_ADDR is chosen for each attempt and set for the ranks",
    "master_port": "MASTER_PORT is chosen for each attempt and set for the ranks",
    "local_addr": "each node answers on the address by which its cluster knows it",
}


def _is(*allowed: str) -> Callable[[str], bool]:
    return lambda text: text in allowed


def _all_signals(text: str) -> bool:
    asked = {word.strip() for word in text.split(",")}
    return asked <= {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}


# dest -> (the values that change nothing, what is said, what to do)
REFUSED: dict[str, tuple[Callable[[str], bool], str, str]] = {
    "node_rank": (
        _is("0"),
        "one command per node is torchrun's way; perdure is started once",
        "start it on one machine only, with --cluster ray (or its address) and --nnodes N",
    ),
    "event_log_handler": (_is("null"), "there are no handlers", "use `perdure events RUN --json`"),
    "role": (_is("default"), "all ranks have the role 'default'", "leave it out"),
    "local_ranks_filter": (
        _is(""),
        "the console shows what --redirects leaves to it, of all ranks",
        "use --redirects 3 and `perdure logs RUN --rank R -f`",
    ),
    "duplicate_stdout_filters": (_is(""), "there are no filters", "pipe `perdure logs RUN -f`"),
    "duplicate_stderr_filters": (_is(""), "there are no filters", "pipe `perdure logs RUN -f`"),
    "logs_specs": (
        _is(),
        "log classes of torch elastic are not loaded",
        "use --log-dir, --redirects and --tee",
    ),
    "numa_binding": (
        _is(),
        "binding to NUMA nodes is not built yet",
        "bind in the script, or use --no-python numactl ... python script.py",
    ),
    "signals_to_handle": (
        _all_signals,
        "perdure handles SIGINT, SIGTERM and SIGHUP, and stops the job at each",
        "leave it out",
    ),
    "virtual_local_rank": (
        _is(),
        "LOCAL_RANK is the rank on its node, and every rank sees all of its devices",
        "leave it out",
    ),
}
LATER: dict[str, str] = {
    "precheck": "prechecks are not built yet",
    "output": "copying a folder of outputs is not built yet: write to the store in the script",
    "from": "starting from another run is not built yet: `perdure resume RUN` goes on with one",
}


def judge(given: Given) -> list[str]:
    """Notes on what was accepted without effect. Raises UsageError on what cannot be."""
    notes = []
    for dest, value in given.values.items():
        name = given.spelled(dest)
        if dest in LATER:
            raise UsageError(f"{name}: {LATER[dest]}", hint="leave it out for now")
        if dest in REFUSED:
            harmless, what, hint = REFUSED[dest]
            if value is not False and not (isinstance(value, str) and harmless(value)):
                raise UsageError(f"{name}: {what}", hint=hint)
        elif dest in ACCEPTED and value is not False:
            notes.append(f"{name} has no effect: {ACCEPTED[dest]}")
    return notes
