"""The working folder as one object: `<run>/code/<sha256>.tar.zst`, the same bytes for the same files.

A rank on another node runs the code that was submitted, not what happens to lie there. The archive is
sorted and carries no times, owners or host names, so that an unchanged folder is stored once. What
git ignores stays out; without git: hidden files, caches and virtual environments. Links that lead
out of the folder stay out too, and are named: on the other side they would point at nothing, or at
something else.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from perdure.runtime.errors import UsageError

MAX_BYTES = 100 * 10**6
SKIPPED = frozenset({"__pycache__", "node_modules", "venv", "env"})


@dataclass(frozen=True, slots=True)
class Package:
    data: bytes
    sha256: str
    files: int
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"code/{self.sha256}.tar.zst"


def pack(folder: str) -> Package:
    """Raises UsageError above 100 MB, naming the largest files."""
    import tarfile

    import zstandard

    paths, notes = _chosen(folder)
    _bounded(folder, paths)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            full = os.path.join(folder, path)
            entry = tarfile.TarInfo(path)  # time 0, no owner: the same bytes everywhere
            if os.path.islink(full):
                entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(full)
                tar.addfile(entry)
                continue
            entry.mode = 0o755 if os.access(full, os.X_OK) else 0o644
            with open(full, "rb") as file:
                content = file.read()  # a file may change under us: its size is taken from here
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    data = zstandard.ZstdCompressor(level=3).compress(raw.getvalue())
    return Package(data, hashlib.sha256(data).hexdigest(), len(paths), tuple(notes))


def _chosen(folder: str) -> tuple[list[str], list[str]]:
    """Relative paths in order, and notes on what was left out against expectation."""
    names = _by_git(folder)
    if names is None:
        names = list(_by_walking(folder))
    chosen, notes = [], []
    root = os.path.realpath(folder)
    for name in sorted(set(names)):
        full = os.path.join(folder, name)
        if os.path.islink(full):
            inside = os.path.realpath(full).startswith(root + os.sep)
            if os.path.isabs(os.readlink(full)) or not inside:
                notes.append(f"{name} -> {os.readlink(full)} leads elsewhere and was left out")
                continue
        elif os.path.isdir(full):  # a git submodule, named by its folder alone
            chosen += [os.path.join(name, inner) for inner in _by_walking(full)]
            continue
        elif not os.path.isfile(full):  # deleted but still tracked, or a socket
            continue
        chosen.append(name)
    return chosen, notes


def _by_git(folder: str) -> list[str] | None:
    """Tracked files and new ones that are not ignored; None where git cannot say."""
    try:
        found = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode != 0:
        return None
    return [os.fsdecode(name) for name in found.stdout.split(b"\0") if name]


def _by_walking(folder: str) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        inner = [
            name
            for name in folders
            if not name.startswith(".")
            and name not in SKIPPED
            and not name.endswith(".egg-info")
            and not os.path.isfile(os.path.join(where, name, "pyvenv.cfg"))
        ]
        links = [name for name in inner if os.path.islink(os.path.join(where, name))]
        folders[:] = [name for name in inner if name not in links]
        for name in [*files, *links]:
            if not name.startswith(".") and not name.endswith((".pyc", ".pyo")):
                yield os.path.relpath(os.path.join(where, name), folder)


def _bounded(folder: str, paths: list[str]) -> None:
    sizes = {path: os.lstat(os.path.join(folder, path)).st_size for path in paths}
    total = sum(sizes.values())
    if total <= MAX_BYTES:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    named = ", ".join(f"{path} ({sizes[path] / 1e6:.0f} MB)" for path in largest)
    raise UsageError(
        f"the working folder {folder} holds {total / 1e6:.0f} MB in {len(paths)} files, and at most "
        f"{MAX_BYTES / 1e6:.0f} MB are sent to the nodes; the largest: {named}",
        hint="name them in .gitignore, start from the code's own folder, or use --code none when "
        "every node has this folder at the same path",
    )
