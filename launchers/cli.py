"""`perdure`: one entry, one place where errors become messages and exit codes.

A command's module is imported when the command is given, so that `perdure run` pays for nothing that
it does not use: the time to a first step begins here. A mistake of the user, the store or the run is
one message and a hint, never a traceback; a traceback means a fault of perdure's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from perdure.launchers.option_table import COMMANDS, LATER, Command
from perdure.launchers.options import Given, nearest, parser, read
from perdure.runtime.errors import PerdureError, UsageError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except PerdureError as error:
        _complain(words, str(error), error.hint, error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `perdure events RUN | head`: who reads has seen enough. Nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from perdure.checkpoint.errors import CheckpointError  # its own tree: no runtime there

        if not isinstance(error, CheckpointError):
            raise
        _complain(words, str(error), error.hint, UsageError.exit_code)
        return UsageError.exit_code


def _run(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_help() if len(words) < 2 or words[1] not in COMMANDS else _help_of(words[1]))
        return 0 if words else 2
    if words[0] in {"-V", "--version"}:
        from perdure import __version__

        print(f"perdure {__version__}")
        return 0
    name, rest = words[0], words[1:]
    command = COMMANDS.get(name)
    if command is None:
        raise _unknown(name)
    if _asks_help(command, rest):
        print(_help_of(name))
        return 0
    return _runner(name)(read(command, rest, os.environ))


def _asks_help(command: Command, words: list[str]) -> bool:
    """-h before the script: after it, it is the script's own."""
    for word in words:
        if word in {"-h", "--help"}:
            return True
        if not word.startswith("-") and command.positional == "script":
            return False
    return False


def _unknown(name: str) -> UsageError:
    if name in LATER:
        return UsageError(f"`perdure {name}` is not built yet", hint="see `perdure --help`")
    if name.endswith(".py") or name.startswith("-"):
        return UsageError(
            f"{name} is not a command", hint="to run a script: perdure run [options] SCRIPT"
        )
    close = nearest(name, list(COMMANDS))
    return UsageError(f"perdure has no command {name}{close}", hint="see `perdure --help`")


def _runner(name: str) -> Callable[[Given], int]:
    if name in {"run", "submit", "resume"}:
        from perdure.launchers import commands_run

        return commands_run.RUNNERS[name]
    if name in {"stop", "save"}:
        from perdure.launchers import commands_control

        return commands_control.stop if name == "stop" else commands_control.save
    if name == "logs":
        from perdure.launchers.commands_logs import logs

        return logs
    from perdure.launchers import commands_ask

    return {"status": commands_ask.status, "why": commands_ask.why, "events": commands_ask.events}[
        name
    ]


def _complain(words: list[str], what: str, hint: str, exit_code: int) -> None:
    if "--json" in words[1:]:
        import json

        print(json.dumps({"error": what, "hint": hint, "exit_code": exit_code}))
    print(f"perdure: {what}\n  what to do: {hint}", file=sys.stderr)


def _help_of(name: str) -> str:
    return parser(COMMANDS[name]).format_help().rstrip()


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    rows = "\n".join(f"  {c.name:<{width}}  {c.summary}" for c in COMMANDS.values())
    return (
        "usage: perdure COMMAND [options]\n\n"
        "Runs a training script on one or many nodes and keeps it running through faults.\n\n"
        f"{rows}\n\n"
        "first job:\n"
        "  perdure run --nproc-per-node 2 train.py     in place of torchrun --nproc-per-node 2 ...\n"
        "  perdure COMMAND --help                      options and an example\n\n"
        "RUN is a run id, or the URL of a run's folder.\n"
        "exit codes: the script's own; 2 cannot run as given; 75 no place in time;\n"
        "            93 restarts without progress; 130, 143, 129 after SIGINT, SIGTERM, SIGHUP"
    )


if __name__ == "__main__":
    sys.exit(main())
