"""The options of every command, as one table, and how a value is found for each.

The table is data: the parser, the help, the config file and the `PET_*` variables all read it, so an
option cannot exist in one of them only, and a test pins the whole set. Values stay text until
`settings.py` judges them: the command line, the config file and the environment then fail with the
same words. Precedence: command line, `--config` file, `PET_*` variable (torchrun's own rule for
those), default.

Nothing here may be slow or import more than argparse: `perdure run` parses before the agent starts.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from perdure.runtime.errors import UsageError

Value = str | bool | list[str]
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
    Option("json", "report as JSON, one object a line", group="logs"),
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


@dataclass(frozen=True, slots=True)
class Given:
    """What was said, where: by dest, as text. An option not said anywhere is absent."""

    command: Command
    values: Mapping[str, Value]
    origin: Mapping[str, str] = field(default_factory=dict)  # dest -> "PET_NNODES", "job.toml"
    target: str | None = None  # script or run
    args: tuple[str, ...] = ()  # the script's own

    def text(self, dest: str) -> str | None:
        value = self.values.get(dest)
        return value if isinstance(value, str) else None

    def flag(self, dest: str) -> bool:
        return self.values.get(dest) is True

    def texts(self, dest: str) -> list[str]:
        value = self.values.get(dest, [])
        return value if isinstance(value, list) else []

    def spelled(self, dest: str) -> str:
        """How the user wrote it: what a complaint must name."""
        option = "--" + dest.replace("_", "-")
        return f"{option} (from {self.origin[dest]})" if dest in self.origin else option


def nearest(word: str, known: Sequence[str]) -> str:
    """' (did you mean --store?)', or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an exception of ours: one message, a hint, exit 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see `{self.prog} --help`")


def parser(command: Command) -> argparse.ArgumentParser:
    made = _Parser(
        prog=f"perdure {command.name}",
        usage=f"perdure {command.name} {command.usage}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=_epilog(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what is abbreviated today may mean something else tomorrow
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[Group, argparse._ArgumentGroup] = {}
    for option in command.options:
        title = "size" if option.group == "torchrun" else option.group
        where = groups.setdefault(title, made.add_argument_group(TITLES[title]))
        if option.metavar is None:
            where.add_argument(
                *option.spellings, dest=option.dest, action="store_true", help=option.help
            )
        else:
            where.add_argument(
                *option.spellings,
                dest=option.dest,
                metavar=option.metavar,
                action="append" if option.many else "store",
                help=option.help,
            )
    if command.positional == "script":
        made.add_argument("target", metavar="SCRIPT", help=argparse.SUPPRESS, nargs="?")
        made.add_argument("args", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    else:
        made.add_argument("target", metavar="RUN", nargs="?", help="run id, or URL of its folder")
    return made


def _epilog(command: Command) -> str:
    text = f"example:\n  {command.example}"
    if any(option.group == "torchrun" for option in command.options):
        names = ", ".join(o.name for o in command.options if o.group == "torchrun")
        text = (
            "torchrun's other options are accepted, or refused with what to do instead:\n"
            f"  {_wrapped(names)}\n\n{text}"
        )
    return text


def _wrapped(text: str) -> str:
    import textwrap

    return "\n  ".join(textwrap.wrap(text, 90))


def read(command: Command, argv: Sequence[str], environ: Mapping[str, str]) -> Given:
    """Raises UsageError; prints and leaves with 0 on --help."""
    known = [s for option in command.options for s in option.spellings]
    space, extra = parser(command).parse_known_args(list(argv))
    said = vars(space)
    target: str | None = said.pop("target", None)
    args = tuple(said.pop("args", ()))
    unknown = [word for word in extra if word.startswith("-")]
    if unknown:
        word = unknown[0].split("=")[0]
        raise UsageError(
            f"perdure {command.name} has no option {word}{nearest(word, known)}",
            hint=f"see `perdure {command.name} --help`; the script's own options go after the script",
        )
    if extra:
        raise UsageError(
            f"{extra[0]!r} is one word too many", hint=f"perdure {command.name} {command.usage}"
        )
    if args[:1] == ("--",):
        args = args[1:]
    values: dict[str, Value] = {}
    origin: dict[str, str] = {}
    _from_environment(command, environ, values, origin)
    if isinstance(path := said.get("config"), str):
        _from_file(command, path, values, origin)
    for dest, value in said.items():
        before = values.get(dest)
        # what may be repeated adds to the file's: --env on top of [env]; the later one wins
        values[dest] = before + value if isinstance(before, list) else value
        origin.pop(dest, None)
    return Given(command, values, origin, target, args)


def _from_environment(
    command: Command,
    environ: Mapping[str, str],
    values: dict[str, Value],
    origin: dict[str, str],
) -> None:
    for option in command.options:
        name = f"PET_{option.dest.upper()}"
        text = environ.get(name)
        if not option.pet or text is None:
            continue
        if option.metavar is None:  # torchrun's own reading: PET_STANDALONE=1
            if text not in {"0", "1"}:
                raise UsageError(f"{name}={text!r} is neither 0 nor 1", hint=f"unset {name}")
            values[option.dest] = text == "1"
        else:
            values[option.dest] = text
        origin[option.dest] = name


def _from_file(
    command: Command, path: str, values: dict[str, Value], origin: dict[str, str]
) -> None:
    import tomllib

    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UsageError(
            f"--config {path}: {error.strerror}", hint="name a TOML file that can be read"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: {error}", hint="correct the file") from error
    by_dest = {option.dest: option for option in command.options if option.name != "config"}
    for key, raw in table.items():
        option = by_dest.get(key.replace("-", "_"))
        if option is None:
            names = [o.name for o in by_dest.values()]
            raise UsageError(
                f"--config {path} has no use for {key!r}{nearest(key, names)}",
                hint="it takes the command's options by their names, without dashes in front",
            )
        values[option.dest] = _value(option, raw, path)
        origin[option.dest] = os.path.basename(path)


def _value(option: Option, raw: object, path: str) -> Value:
    def wrong(wanted: str) -> NoReturn:
        raise UsageError(
            f"--config {path}: {option.name} = {raw!r} should be {wanted}", hint="correct the file"
        )

    if option.metavar is None:
        return raw if isinstance(raw, bool) else wrong("true or false")
    if option.many:
        if isinstance(raw, dict) and "=" in (option.metavar or ""):
            return [f"{k}={v}" for k, v in raw.items()]
        if isinstance(raw, list) and all(isinstance(item, str) for item in raw):
            return [str(item) for item in raw]
        return [raw] if isinstance(raw, str) else wrong("a list of texts")
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        wrong("a text or a number")
    return str(raw)
