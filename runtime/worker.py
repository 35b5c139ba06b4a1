"""A rank's own process: everything between a fork (or an exec) and the first line of the script.

Law: a rank is equal to `python -u script.py`. The script finds a real `__main__`, its folder in
sys.path[0], its own argv, fresh signal handlers, its own random state, its own command line in `ps`; an
uncaught exception is printed by the interpreter itself, without a frame of ours; exit codes, SystemExit
and Ctrl-C are the interpreter's as well. What differs: inspect.stack() has two frames below the
script, and the hash seed is shared by the ranks of a node.

What we add: a hook after each optimizer step that counts it in the beat page, one before it that
leaves when the fence has passed, and torch-elastic's error file when the script dies of an exception.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib.abc
import importlib.machinery
import json
import os
import random
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any, NoReturn
from weakref import ref

from perdure.runtime import beatpage, proc

FENCED = 76  # exit code: this rank outlived its lease
BEAT_FD, WAKE_FD = 3, 4  # the numbers that a rank gets them under
_OPTIMIZERS = "torch.optim.optimizer"
_TRACEBACK_CHARS_MAX = 100_000


def forked(
    request: Mapping[str, Any], index: int, fds: Sequence[int], *, middle: int, agent: int
) -> Callable[[], None]:
    """Turn a child of the zygote into rank `index` of a launch; returns what runs its script."""
    rank = request["ranks"][index]
    os.setsid()
    proc.reset_signals()
    out, err, beat = rank["fds"]
    proc.place_fds({0: fds[0], 1: fds[out], 2: fds[err], BEAT_FD: fds[beat], WAKE_FD: fds[1]})
    os.environ.clear()
    os.environ.update(request["env"])
    os.environ.update(rank["env"])
    random.seed()
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()
    sys.modules["torch"].default_generator.seed()  # anew from the system, as in a fresh process
    gc.enable()
    with contextlib.suppress(FileNotFoundError):
        os.chdir(request["cwd"])
    run = _Script(request["entry"], request["argv"])
    install_hook()
    # Until the middle process has ended it is our parent, and its death would look like the agent's.
    while os.getppid() == middle:
        time.sleep(0.0002)
    proc.die_with_parent(agent)
    return run


def main(fd: int) -> Callable[[], None]:
    """A cold rank: started as a program, with its request behind `fd`; torch is not imported."""
    with open(fd, "rb") as file:
        request = json.load(file)
    run = _Script(request["entry"], request["argv"])
    sys.meta_path.insert(0, _WhenOptimizersLoad())
    return run


class _Script:
    """Called at the very bottom of the stack, so that the script has next to nothing below it."""

    def __init__(self, entry: str, argv: Sequence[str]) -> None:
        self._entry, self._argv = entry, list(argv)
        beatpage.mine = beatpage.from_environment()
        beatpage.wake_fd = WAKE_FD if beatpage.mine is not None else None
        flag = ["-m"] if entry == "module" else []
        sys.orig_argv[:] = [sys.executable, "-u", *flag, *argv]
        proc.set_name(os.path.basename(sys.executable))
        proc.set_command_line(sys.orig_argv)

    def __call__(self) -> None:
        try:
            if self._entry == "module":
                self._module()
            elif os.path.isfile(self._argv[0]) and not self._argv[0].endswith((".pyc", ".zip")):
                exec(self._code(), sys.modules["__main__"].__dict__)  # noqa: S102 - the script
            else:
                self._folder_or_archive()
        except SystemExit as leave:
            if leave.code in (None, 0):
                self._done()
            raise
        except BaseException as error:
            _hide_our_frames()
            _write_error_file(error)
            raise
        self._done()

    def _code(self) -> Any:
        script = os.path.abspath(self._argv[0])
        sys.argv[:] = self._argv
        sys.path.insert(0, os.path.dirname(os.path.realpath(script)))
        with open(script, "rb") as file:
            source = file.read()
        names = _fresh_main()
        names["__loader__"] = importlib.machinery.SourceFileLoader("__main__", script)
        names["__file__"] = script
        names["__cached__"] = None
        return compile(source, script, "exec", dont_inherit=True)

    def _module(self) -> None:
        sys.argv[:] = ["-m", *self._argv[1:]]
        sys.path.insert(0, os.getcwd())
        _fresh_main()
        runpy._run_module_as_main(self._argv[0])  # type: ignore[attr-defined]  # what python -m calls

    def _folder_or_archive(self) -> None:
        script = self._argv[0]
        if not os.path.exists(script):
            where = os.path.abspath(script)
            sys.stderr.write(
                f"{sys.executable}: can't open file {where!r}: [Errno 2] No such file or directory\n"
            )
            raise SystemExit(2)
        sys.argv[:] = self._argv
        _fresh_main()
        runpy.run_path(script, run_name="__main__")

    def _done(self) -> None:
        if beatpage.mine is not None:
            beatpage.mine.write_phase(beatpage.DONE)


def _fresh_main() -> dict[str, Any]:
    names = sys.modules["__main__"].__dict__
    names.clear()
    names.update(
        __name__="__main__",
        __doc__=None,
        __package__=None,
        __loader__=None,
        __spec__=None,
        __annotations__={},
        __builtins__=builtins,
    )
    return names


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    ours = (__file__, "<string>")
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace


def _hide_our_frames() -> None:
    """Let the interpreter print the exception that now leaves the script as if we were not there."""
    hook = sys.excepthook

    def shown(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        trace = _without_ours(trace)
        hook(kind, error.with_traceback(trace), trace)

    sys.excepthook = shown


def _write_error_file(error: BaseException) -> None:
    """In torch-elastic's format, unless the script (its @record) has written one itself."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or isinstance(error, KeyboardInterrupt):
        return
    trace = traceback.format_exception(type(error), error, _without_ours(error.__traceback__))
    text = "".join(trace)[-_TRACEBACK_CHARS_MAX:]
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}"[:4096], "extraInfo": extra}
    # A full disk must not hide the script's own error, which goes to stderr in any case.
    with contextlib.suppress(OSError), open(path, "x") as file:
        json.dump({"message": message}, file)


def install_hook(page: beatpage.BeatPage | None = None) -> None:
    """Count the optimizer steps of this process in `page` (default: this rank's own)."""
    page = page or beatpage.mine
    if page is not None:
        optimizers = importlib.import_module(_OPTIMIZERS)
        before, after = hooks(page)
        optimizers.register_optimizer_step_pre_hook(before)
        optimizers.register_optimizer_step_post_hook(after)


def hooks(page: beatpage.BeatPage) -> tuple[Callable[..., None], Callable[..., None]]:
    """What runs before and after each optimizer step: together about a microsecond.

    The step is the largest count of any one optimizer: a script with two (a GAN) steps both a round.
    The optimizer seen last is remembered by a weak reference, so nothing is kept alive or marked.
    """
    words, now_ns = page.words, time.monotonic_ns
    counts: list[tuple[ref[object], list[int]]] = []
    last: Callable[[], object | None] = lambda: None
    count = [0]

    def before(_optimizer: object, _args: object, _kwargs: object) -> None:
        if words[beatpage.FENCE] and now_ns() >= words[beatpage.FENCE]:
            _leave_fenced()

    def after(optimizer: object, _args: object, _kwargs: object) -> None:
        nonlocal last, count
        if last() is not optimizer:
            last, count = _count_of(optimizer, counts)
        count[0] = steps = count[0] + 1
        now = now_ns()
        words[beatpage.ALIVE_AT] = now
        if page.counted_by_script or steps <= words[beatpage.STEP]:
            return
        words[beatpage.STEP_AT] = now
        words[beatpage.STEP] = steps
        if steps == 1:
            if words[beatpage.PHASE] == beatpage.START:
                words[beatpage.PHASE] = beatpage.TRAIN
            beatpage.wake_agent()

    return before, after


def _count_of(
    optimizer: object, counts: list[tuple[ref[object], list[int]]]
) -> tuple[ref[object], list[int]]:
    counts[:] = [(known, count) for known, count in counts if known() is not None]
    for known, count in counts:
        if known() is optimizer:
            return known, count
    counts.append((ref(optimizer), [0]))
    return counts[-1]


def _leave_fenced() -> NoReturn:
    os.write(
        2,
        b"perdure: this node heard nothing of the job's controller for too long; its place may have "
        b"been given to another, so this rank leaves before its next step\n",
    )
    os._exit(FENCED)


class _WhenOptimizersLoad(importlib.abc.MetaPathFinder):
    """Installs the hook the moment that torch's optimizer module has been imported by the script."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _OPTIMIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.abc.Loader):
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if beatpage.mine is not None:
                    before, after = hooks(beatpage.mine)
                    module.register_optimizer_step_pre_hook(before)
                    module.register_optimizer_step_post_hook(after)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
