"""The process that has torch imported and forks ranks.

Importing torch and its compiler front end (which the first optimizer pulls in) costs two seconds of
processor time a rank; here it is paid once a node, and a restart after a fault pays nothing: a fork
takes some milliseconds. The garbage collector is off while importing (measured by a third faster) and
what was imported is frozen out of later collections, so that ranks share its memory.

A rank must be equal to a fresh `python script.py`; `worker.py` sees to that. What this process must
never do: call into a device, start a thread, open a client, hold the run's token. A fork with a second
thread alive is refused; OpenBLAS starts a pool when numpy is imported and ends it at a fork, which is
why one empty fork is made before the count.

Ranks are forked by a middle process that ends at once, so that they become children of the agent (a
subreaper): the agent alone reaps them, sees exit status and usage first-hand, and a zygote that dies
takes no rank with it.

The rendezvous store of an attempt is forked here too: it needs torch, must outlive rank 0, and takes
over a socket that the agent bound and that has been accepting since.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from perdure.runtime import proc
from perdure.runtime.zygote_link import FDS_MAX

_PRELOAD = ("torch", "torch._dynamo", "torch.distributed")


def main(fd: int) -> Callable[[], None]:
    """A zygote that was started as a program. In a rank: what that rank runs."""
    parent = os.getppid()
    proc.die_with_parent(parent)
    return serve(socket.socket(fileno=fd), parent)


def serve(sock: socket.socket, agent: int) -> Callable[[], None]:
    """Import, then answer launches until the agent is gone. Returns in ranks only."""
    proc.die_with_parent(agent)
    proc.set_name("perdure-zygote")
    proc.set_command_line(["perdure-zygote"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _forget_stdin()
    begun_s = time.monotonic()
    unfit = _import()
    _answer(sock, warm=unfit is None, why=unfit, seconds=round(time.monotonic() - begun_s, 3))
    while True:
        data, fds, _, _ = socket.recv_fds(sock, 64, FDS_MAX)
        if not data:
            os._exit(0)
        with open(fds.pop(0), "rb") as file:
            request = json.load(file)
        why = unfit or _shadowed(request["path0"])
        if why is not None:
            _answer(sock, cold=why)
        else:
            rank = _fork(request, fds, sock, agent)
            if rank is not None:
                return rank
        for fd in fds:
            os.close(fd)


def _forget_stdin() -> None:
    """The agent's configuration is on it, or will be."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _import() -> str | None:
    """Returns why ranks cannot be forked from here, or None."""
    gc.disable()
    try:
        for name in _PRELOAD:
            importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises: a cold rank will show it
        return f"importing torch failed: {type(error).__name__}: {error}"
    gc.freeze()
    empty = os.fork()
    if empty == 0:
        os._exit(0)
    os.waitpid(empty, 0)
    if (count := proc.threads()) != 1:
        return f"importing torch left {count} threads"
    return None


def _shadowed(folder: str) -> str | None:
    """Would a fresh process find another module in the script's folder than we have loaded?"""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return None  # no such folder: the rank itself will say so
    for entry in entries:
        name, _, suffix = entry.name.partition(".")
        module = sys.modules.get(name)
        if module is None or name == "__main__" or (suffix != "py" and entry.is_file()):
            continue
        if suffix == "" and not os.path.exists(os.path.join(entry.path, "__init__.py")):
            continue
        origin = getattr(module, "__file__", None) or ""
        builtin = name in sys.builtin_module_names
        if not builtin and not os.path.realpath(origin).startswith(os.path.realpath(entry.path)):
            return f"{entry.name} beside the script shadows a module that torch has imported"
    return None


def _fork(
    request: dict[str, Any], fds: list[int], sock: socket.socket, agent: int
) -> Callable[[], None] | None:
    """Fork all ranks of a launch through a middle process. In a rank: what it runs; else None."""
    middle = proc.fork()
    if middle:
        os.waitpid(middle, 0)
        return None
    me = os.getpid()
    proc.die_with_parent(os.getppid())
    pids: dict[str, int] = {}
    try:
        for index, rank in enumerate(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                from perdure.runtime import worker

                return worker.forked(request, index, fds, middle=me, agent=agent)
            pids[str(rank["rank"])] = pid
        store = _fork_store(request["store"], fds, agent, me)
        _answer(sock, forked=pids, store=store)
    except OSError as error:  # no memory, no process numbers: nothing half done
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        _answer(sock, failed=f"fork: {error}")
    os._exit(0)


def _fork_store(
    wanted: dict[str, Any] | None, fds: list[int], agent: int, middle: int
) -> int | None:
    if wanted is None:
        return None
    pid = os.fork()
    return pid if pid else _store(wanted, fds[wanted["fd"]], agent, middle)


def _store(wanted: dict[str, Any], fd: int, agent: int, middle: int) -> NoReturn:
    """Serve the rendezvous store on a socket that already listens, until we are killed."""
    code = 1
    try:
        proc.place_fds({0: 0, 1: 2, 2: 2, 3: fd})
        proc.set_name("perdure-store")
        proc.set_command_line(["perdure-store", f"{wanted['host']}:{wanted['port']}"])
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(
            wanted["host"],
            wanted["port"],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=3,
            use_libuv=True,
        )
        while os.getppid() == middle:
            time.sleep(0.001)
        proc.die_with_parent(agent)
        while store is not None:
            signal.pause()
    except BaseException as error:  # noqa: BLE001 - nothing may climb into the zygote's stack
        os.write(2, f"perdure: the rendezvous store failed: {error}\n".encode())
    finally:
        os._exit(code)


def _answer(sock: socket.socket, **fields: object) -> None:
    try:
        sock.send(json.dumps(fields).encode())
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the agent is gone, and its parent-death signal on its way
