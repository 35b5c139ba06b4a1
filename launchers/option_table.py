"""Every option of every command, as one table.

The table is data: the parser, the help, the config file and the `PET_*` variables all read it, so an
option cannot exist in one of them only, and a test pins the whole set.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

Group = Literal["size", "script", "store", "cluster", "logs", "environment", "torchrun", "run"]


@dataclass(frozen=True, slots=True)
class Option:
    name: str  # with dashes; underscores are accepted everywhere
    help: str
    metavar: str | None = None  # None: a flag
    short: str | None = None
    many: bool = False
    group: Group = "run"
    pet: bool = False  # torchrun reads PET_<NAME> for it

    @property
    def dest(self) -> str:
        return self.name.replace("-", "_")

    @property
    def spellings(self) -> list[str]:
        """Every way to write it: short, with dashes, with underscores."""
        long = dict.fromkeys([f"--{self.name}", f"--{self.dest}"])
        return [*([self.short] if self.short else []), *long]


def _t(name: str, metavar: str | None = None, short: str | None = None) -> Option:
    # help=SUPPRESS: listed by name only, what becomes of each stands in torchrun_options.py
    return Option(name, argparse.SUPPRESS, metavar, short, group="torchrun", pet=True)


LAUNCH: tuple[Option, ...] = (
    Option("nnodes", "nodes of the job (default 1)", "N", group="size", pet=True),
    Option(
        "nproc-per-node",
        "ranks a node: a number, auto, gpu, npu or cpu (default 1)",
        "N",
        group="size",
        pet=True,
    ),
    Option("spares", "extra nodes kept ready for a lost one (default 0)", "N", group="size"),
    Option("device", "auto, cuda, npu or cpu (default auto)", "KIND", group="size"),
    Option(
        "max-restarts",
        "cap on restarts blamed on the script or on nothing known; "
        "unset: a budget of 100 an hour, and a stop when nothing moves forward",
        "N",
        group="script",
        pet=True,
    ),
    Option("module", "SCRIPT is a module, as in python -m", None, "-m", group="script", pet=True),
    Option("no-python", "SCRIPT is a program, not Python", group="script", pet=True),
    Option("no-warm", "start each rank as a fresh interpreter", group="script"),
    Option("save-every", "steps between saves, for run.due()", "STEPS", group="script"),
    Option(
        "shutdown-timeout",
        "seconds from SIGTERM to SIGKILL when the job is stopped (default 30)",
        "S",
        group="script",
        pet=True,
    ),
    Option(
        "store",
        "where runs live: s3://bucket/prefix, file:///shared, or a folder; the run's own folder "
        "is made below it (default: a state folder on this machine)",
        "URL",
        group="store",
    ),
    Option("name", "the run's id (default: script, date and four letters)", "ID", group="store"),
    Option("tag", "a label kept in the spec; may be repeated", "K=V", many=True, group="store"),
    Option("cluster", "local, ray, or the address of a Ray cluster", "WHERE", group="cluster"),
    Option(
        "code",
        "package: send the working folder to every node; none: it has the same path everywhere",
        "HOW",
        group="cluster",
    ),
    Option(
        "env",
        "a variable for the ranks; K alone takes its value from here, as a secret",
        "K[=V]",
        many=True,
        group="environment",
    ),
    Option(
        "env-file", "K=V lines, all secret; may be repeated", "FILE", many=True, group="environment"
    ),
    Option("config", "a TOML file with these options by their names", "FILE", group="environment"),
    Option("log-dir", "folder for the ranks' log files", "DIR", group="logs", pet=True),
    Option(
        "redirects",
        "what goes to files and not to the console: 0, 1, 2, 3 or RANK:N,... (default 0)",
        "STD",
        "-r",
        group="logs",
        pet=True,
    ),
    Option(
        "tee", "what goes to both, with a prefix (default 0)", "STD", "-t", group="logs", pet=True
    ),
    Option("json", "report as JSON, one object a line; ranks write to files only", group="logs"),
    Option("dry-run", "print the spec and start nothing"),
    # Everything else that torchrun 2.13 has; see torchrun_options.py.
    _t("standalone"),
    _t("rdzv-backend", "X"),
    _t("rdzv-endpoint", "X"),
    _t("rdzv-id", "X"),
    _t("rdzv-conf", "X"),
    _t("monitor-interval", "X"),
    _t("start-method", "X"),
    _t("event-log-handler", "X"),
    _t("role", "X"),
    _t("run-path"),
    _t("local-ranks-filter", "X"),
    _t("duplicate-stdout-filters", "X"),
    _t("duplicate-stderr-filters", "X"),
    _t("node-rank", "X"),
    _t("master-addr", "X"),
    _t("master-port", "X"),
    _t("local-addr", "X"),
    _t("logs-specs", "X"),
    _t("numa-binding", "X"),
    _t("signals-to-handle", "X"),
    _t("virtual-local-rank"),
    # Named by the design, not built yet: refused in words, never ignored.
    Option("precheck", argparse.SUPPRESS, "LEVEL"),
    Option("output", argparse.SUPPRESS, "DIR"),
    Option("from", argparse.SUPPRESS, "RUN"),
)

RESUME: tuple[Option, ...] = (
    Option("step", "go back to this checkpoint: later ones leave the run's line", "N"),
    Option("takeover", "go on although the run looks alive"),
)
JSON = Option("json", "report as JSON")
FOLLOW = Option("follow", "go on until the run ends", None, "-f")
RANK = Option("rank", "only this rank; may be repeated", "R", many=True)

TITLES: dict[Group, str] = {
    "size": "size",
    "script": "script and recovery",
    "store": "the run",
    "cluster": "where",
    "environment": "environment",
    "logs": "output",
    "run": "more",
}
# A resumed run keeps its name, store and entry: they are what makes it the same run.
NOT_ON_RESUME = {"store", "name", "module", "no-python", "code", "run-path"}


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    summary: str
    usage: str
    example: str
    options: tuple[Option, ...] = ()
    positional: Literal["script", "run", "run?"] = "run"


COMMANDS: dict[str, Command] = {
    c.name: c
    for c in (
        Command(
            "run",
            "run a training script in the foreground; the exit code is the job's",
            "[options] SCRIPT [ARGS...]",
            "perdure run --nproc-per-node 2 train.py --lr 0.1\n"
            "  perdure run --cluster ray --nnodes 2 --spares 1 --store s3://bucket/runs train.py",
            LAUNCH,
            "script",
        ),
        Command(
            "submit",
            "start a job that goes on without this terminal; prints its run id",
            "[options] SCRIPT [ARGS...]",
            "perdure submit --nproc-per-node 8 --save-every 500 train.py",
            LAUNCH,
            "script",
        ),
        Command(
            "resume",
            "go on with a run from its newest whole checkpoint, also at another size",
            "RUN [options]",
            "perdure resume train-1124-093000-k3xq --nproc-per-node 4\n"
            "  perdure resume s3://bucket/runs/train-1124-093000-k3xq --step 2000",
            (*RESUME, *(o for o in LAUNCH if o.name not in NOT_ON_RESUME)),
        ),
        Command(
            "stop",
            "save if the script can, end every rank, keep the run resumable",
            "RUN [options]",
            "perdure stop train-1124-093000-k3xq",
            (Option("now", "no save, no grace"), JSON),
        ),
        Command(
            "save",
            "ask for a checkpoint now and wait until it is committed",
            "RUN [options]",
            "perdure save train-1124-093000-k3xq",
            (JSON,),
        ),
        Command(
            "status",
            "what a run does now; without RUN: every run started here",
            "[RUN] [options]",
            "perdure status --json train-1124-093000-k3xq",
            (JSON,),
            "run?",
        ),
        Command(
            "why",
            "what went wrong, what was done about it, how long it took",
            "RUN [options]",
            "perdure why s3://bucket/runs/train-1124-093000-k3xq",
            (JSON,),
        ),
        Command(
            "logs",
            "what the ranks printed in the newest attempt",
            "RUN [options]",
            "perdure logs train-1124-093000-k3xq --rank 0 -f",
            (FOLLOW, RANK),
        ),
        Command(
            "events",
            "every event and decision of a run, oldest first",
            "RUN [options]",
            "perdure events --json train-1124-093000-k3xq | jq .kind",
            (FOLLOW, JSON),
        ),
    )
}
LATER = ("precheck", "nodes", "health", "hang", "ckpt", "bench", "simulate", "serve")
