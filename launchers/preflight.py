"""What can be found out before any rank starts is found out here, with one message each.

The local agent is already starting while these checks run, so they are free as long as they are
quick; when one refuses, the caller ends the agent and nothing is left. User code is compiled, never
run: not even the parents of a dotted module are imported.
"""

from __future__ import annotations

import difflib
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING

from perdure.runtime.errors import RunProblem, StoreProblem, UsageError
from perdure.runtime.spec import JobSpec

if TYPE_CHECKING:
    from perdure.checkpoint.store import Store

MAX_SOURCE_BYTES = 10 * 2**20  # a larger "script" is something else: the interpreter may say so


def check_entry(spec: JobSpec, *, here: bool) -> None:
    """`here`: the ranks run on this machine, so what it lacks they lack too."""
    if spec.entry == "script":
        _check_script(spec.argv[0], spec.cwd)
    elif spec.entry == "module" and here:
        _check_module(spec.argv[0], spec.cwd)
    elif spec.entry == "command" and here:
        _check_command(spec.argv[0], spec.cwd)


def _check_script(script: str, cwd: str) -> None:
    path = os.path.join(cwd, script)
    if os.path.isdir(path):
        runnable = os.path.isfile(os.path.join(path, "__main__.py"))
        raise UsageError(
            f"{script} is a folder, not a script",
            hint=f"run it as a module: -m {os.path.basename(script.rstrip('/'))}"
            if runnable
            else "name the script in it",
        )
    if not os.path.exists(path):
        raise UsageError(f"there is no script {script}", hint=_missing_hint(script, path))
    if not os.access(path, os.R_OK):
        raise UsageError(f"{script} may not be read", hint=f"chmod u+r {script}")
    if os.path.getsize(path) <= MAX_SOURCE_BYTES:
        _compile(path, script)


def _missing_hint(script: str, path: str) -> str:
    folder = os.path.dirname(path)
    try:
        there = os.listdir(folder)
    except OSError:
        return f"the folder {os.path.dirname(script)} is not there either"
    close = difflib.get_close_matches(os.path.basename(script), there, n=1)
    if close:
        return f"did you mean {os.path.join(os.path.dirname(script), close[0])}?"
    if not script.endswith(".py"):
        return "a module is started with -m, a program that is not Python with --no-python"
    return f"check the path: it is looked for in {folder}"


def _compile(path: str, shown: str) -> None:
    try:
        with open(path, "rb") as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the rank itself will say them
            compile(source, shown, "exec", dont_inherit=True)
    except OSError as error:
        raise UsageError(f"{shown} may not be read: {error.strerror}", hint="check it") from error
    except SyntaxError as error:
        where = "".join(traceback.format_exception_only(error)).rstrip()
        raise UsageError(
            f"{shown} has a syntax error, so no rank could start\n{where}",
            hint="correct it; if it is not Python, use --no-python",
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"{shown} cannot be compiled: {error}", hint="if it is not Python, use --no-python"
        ) from error


def find_module(name: str, path: Sequence[str]) -> ModuleSpec | None:
    """The spec of a module, also a dotted one, without importing anything."""
    where: Sequence[str] | None = list(path)
    found: ModuleSpec | None = None
    parts = name.split(".")
    for depth in range(len(parts)):
        full = ".".join(parts[: depth + 1])
        found = PathFinder.find_spec(full, where)
        if found is None and depth == 0:
            found = _other_finders(full)
        if found is None:
            return None
        where = list(found.submodule_search_locations or [])
    return found


def _other_finders(name: str) -> ModuleSpec | None:
    """Editable installs and frozen modules come through finders of their own."""
    for finder in sys.meta_path:
        if finder is not PathFinder and (found := finder.find_spec(name, None)) is not None:
            return found
    return None


def _check_module(name: str, cwd: str) -> None:
    path = [cwd, *sys.path[1:]]
    found = find_module(name, path)
    if found is None:
        hint = "check the name, and that this environment has it installed"
        if name.endswith(".py") or "/" in name:
            hint = f"-m takes a module's name; to run the file leave -m out: {name}"
        raise UsageError(f"there is no module {name}", hint=hint)
    if found.submodule_search_locations is not None:
        package = found
        found = find_module(f"{name}.__main__", path)
        if found is None:
            raise UsageError(
                f"{name} is a package without __main__ ({package.name} cannot be started)",
                hint=f"name the module in it: -m {name}.train",
            )
    if found.origin and found.origin.endswith(".py") and found.has_location:
        _compile(found.origin, found.origin)


def _check_command(command: str, cwd: str) -> None:
    if os.sep in command:
        path = os.path.join(cwd, command)
        if not os.path.exists(path):
            raise UsageError(f"there is no program {command}", hint="check the path")
        if os.path.isdir(path) or not os.access(path, os.X_OK):
            raise UsageError(
                f"{command} is not executable",
                hint=f"chmod u+x {command}; a Python script needs no --no-python",
            )
    elif shutil.which(command) is None:
        raise UsageError(
            f"no program {command} on PATH",
            hint="install it, or give its path, as in ./train.sh",
        )


def open_probed(spec: JobSpec) -> Store:
    """The run's folder in its store, shown to exist, to accept us and to keep what it is given."""
    from perdure.checkpoint.errors import CheckpointError
    from perdure.checkpoint.store import open_store

    try:
        store = open_store(spec.store)
        store.probe()
    except CheckpointError as error:
        raise StoreProblem(str(error), hint=error.hint) from error
    return store


def check_new(store: Store, run: str) -> None:
    """Two jobs in one folder would take each other's checkpoints for their own."""
    if store.exists("spec.json"):
        raise RunProblem(
            f"a run named {run} exists already in {store.url}",
            hint=f"go on with it: perdure resume {run}; or choose another --name",
        )


def check_sharing(spec: JobSpec, cluster: str) -> None:
    """What this machine can see of it; each node then proves a folder by reading the run's nonce."""
    if spec.store.startswith("memory://"):
        raise StoreProblem(
            f"{spec.store} is the memory of one process, and a job is several",
            hint="use --store s3://BUCKET/PREFIX, or a folder",
        )
    if cluster != "local" and spec.store.startswith("file://") and _is_private(spec.store):
        raise StoreProblem(
            f"{spec.store} is this machine's own state folder, and the job runs on others",
            hint="use --store s3://BUCKET/PREFIX, or a folder that every node mounts",
        )


def _is_private(url: str) -> bool:
    from perdure.launchers.records import home

    return url.startswith(f"file://{os.path.abspath(home())}/") and "PERDURE_HOME" not in os.environ


def check_inside(spec: JobSpec) -> None:
    """A script that is not in the package would be missing on every other node."""
    if spec.entry != "script":
        return
    script = os.path.realpath(os.path.join(spec.cwd, spec.argv[0]))
    if not script.startswith(os.path.realpath(spec.cwd) + os.sep):
        raise UsageError(
            f"{spec.argv[0]} lies outside the working folder {spec.cwd}, which is what is sent to "
            "the nodes",
            hint="start from the folder of the code, or use --code none when every node has it",
        )
    if os.path.isabs(spec.argv[0]):
        raise UsageError(
            f"{spec.argv[0]} is an absolute path, and the code lies elsewhere on the nodes",
            hint=f"name it from the working folder: {os.path.relpath(script, spec.cwd)}",
        )
