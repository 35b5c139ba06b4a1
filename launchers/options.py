"""How a value is found for each option: command line, `--config` file, `PET_*` variable, in this order.

Values stay text until `settings.py` judges them: the command line, the config file and the
environment then fail with the same words. `PET_*` is torchrun's own way to set an option, so it is
read for torchrun's options only.

Nothing here may be slow or import more than argparse: `perdure run` parses before the agent starts.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from perdure.launchers.option_table import TITLES, Command, Group, Option
from perdure.runtime.errors import UsageError

Value = str | bool | list[str]


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
    longer = [name for name in known if len(word) > 3 and name.startswith(word)]
    close = longer or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an exception of ours: one message, a hint, exit 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see `{self.prog} --help`")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def parser(command: Command) -> argparse.ArgumentParser:
    made = _Parser(
        prog=f"perdure {command.name}",
        usage=f"perdure {command.name} {command.usage}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=_epilog(command),
        formatter_class=_Formatter,
        allow_abbrev=False,  # what is abbreviated today may mean something else tomorrow
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[Group, argparse._ArgumentGroup] = {}
    for option in command.options:
        title = "size" if option.group == "torchrun" else option.group
        where = groups.setdefault(title, made.add_argument_group(TITLES[title]))
        if option.metavar is None:
            made_option = where.add_argument(
                *option.spellings, dest=option.dest, action="store_true", help=option.help
            )
        else:
            made_option = where.add_argument(
                *option.spellings,
                dest=option.dest,
                metavar=option.metavar,
                action="append" if option.many else "store",
                help=option.help,
            )
        # the help need not say each option twice; underscores are parsed all the same
        made_option.option_strings = [s for s in option.spellings if "_" not in s]
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
