"""A folder as a store, in plain Python: no client to import, nothing to configure.

A put writes a temporary name beside the key, syncs it, and gives it the key: by rename, or, for a
create-only put, by a hard link, which the file system refuses when the name is taken (NFS too). A
crash leaves a temporary name at worst; `list` does not show it, and no reader looks at it. Folders
are synced after their entries, so that a commit that was answered survives a power cut.

Where hard links are not to be had (some FUSE and CIFS mounts) a claim is made beside the key with
O_EXCL, which is as safe in a race, but a crash between claim and rename leaves the key taken with
nothing under it: `capabilities()` says "lock".
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path

from perdure.checkpoint.errors import (
    KeyExists,
    KeyMissing,
    NoSuchBucket,
    StoreError,
    StoreRefused,
)
from perdure.checkpoint.store import Buffer, Capabilities, CreateOnly, Entry, Store

_HIDDEN = ".tmp-"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class FileStore(Store):
    def __init__(self, path: str) -> None:
        self._root = Path(path).absolute()
        super().__init__(f"file://{self._root}")
        self._create_only: CreateOnly = "native"

    def capabilities(self) -> Capabilities:
        return Capabilities(self._create_only, "file")

    def _put(self, key: str, data: Buffer, create: bool) -> None:
        target = self._root / key
        temporary = target.with_name(f"{_HIDDEN}{uuid.uuid4().hex}")
        try:
            self._make_folder(target.parent)
            if create and target.exists():  # cheap, and spares writing the data
                raise KeyExists(f"{key} is already in {self.url}")
            try:
                _write_synced(temporary, data)
                if create:
                    self._take(temporary, target, key)
                else:
                    os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)
        except OSError as error:
            raise self._said(error, "written") from error

    def _take(self, temporary: Path, target: Path, key: str) -> None:
        taken = KeyExists(f"{key} is already in {self.url}")
        try:
            os.link(temporary, target)
        except FileExistsError:
            # NFS may answer "exists" to a link that its own lost answer had made.
            if temporary.stat().st_nlink != 2:
                raise taken from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._create_only = "lock"
            try:
                claim = target.with_name(f"{_HIDDEN}claim-{target.name}")
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                raise taken from None
            os.replace(temporary, target)

    def _get(self, key: str, begin: int, end: int | None) -> bytes:
        try:
            with open(self._root / key, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                return _read(file.fileno(), begin, size if end is None else min(end, size))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise KeyMissing(f"{key} is not in {self.url}") from None
        except OSError as error:
            raise self._said(error, "read") from error

    def _list(self, prefix: str) -> list[Entry]:
        found: list[Entry] = []
        folders = [self._root / prefix]
        while folders:
            try:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        if entry.name.startswith(_HIDDEN):
                            continue
                        if entry.is_dir():
                            folders.append(Path(entry.path))
                            continue
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            stat = entry.stat()
                            key = os.path.relpath(entry.path, self._root)
                            found.append(Entry(key, stat.st_size, stat.st_mtime))
            except (FileNotFoundError, NotADirectoryError):
                continue  # no such prefix, or its last key was deleted meanwhile
            except OSError as error:
                raise self._said(error, "listed") from error
        return found

    def _delete(self, key: str) -> None:
        path = self._root / key
        try:
            path.unlink(missing_ok=True)
            path.with_name(f"{_HIDDEN}claim-{path.name}").unlink(missing_ok=True)
        except OSError as error:
            raise self._said(error, "changed") from error

    def _exists(self, key: str) -> bool:
        return (self._root / key).is_file()

    def _make_folder(self, folder: Path) -> None:
        """Missing folders, each synced into its parent: else a power cut could lose the chain.

        Folders are never removed, not even when empty: a put beside us may be about to use them.
        """
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            _sync_folder(path.parent)

    def _said(self, error: OSError, verb: str) -> StoreError:
        what = f"the store {self.url} cannot be {verb}: {error.strerror or error}"
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return StoreRefused(
                what, hint=f"Make {self._root} writable for this user, or name another folder."
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(what, hint="Free space there, then try again.")
        if isinstance(error, NotADirectoryError | FileExistsError):
            return NoSuchBucket(what, hint=f"{self._root} must be a folder, or not exist yet.")
        return StoreError(what, hint=f"Look at the file system that holds {self._root}.")


def _write_synced(path: Path, data: Buffer) -> None:
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data).cast("B")
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _read(descriptor: int, begin: int, end: int) -> bytes:
    parts = []
    while begin < end and (part := os.pread(descriptor, end - begin, begin)):
        parts.append(part)
        begin += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
