"""Any store that fsspec knows; s3fs among them, as the fallback for S3.

Used so that what fsspec does badly is left out: no write-behind file objects (`open("wb")` buffers
and hides errors until close), no caches of listings or instances (another process's puts would stay
unseen), no `makedirs` on S3 (it may create a bucket). Create-only puts use fsspec's `mode="create"`;
a file system that ignores it is found out by `probe()`, and looked at before each put from then on.
"""

from __future__ import annotations

import datetime
import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from perdure.checkpoint.errors import (
    KeyExists,
    KeyMissing,
    NoSuchBucket,
    StoreError,
    StoreRefused,
    StoreUnreachable,
)
from perdure.checkpoint.store import Buffer, Capabilities, CreateOnly, Entry, Store

_PART_BYTES = 32 * 1024 * 1024
_SLOWEST_BYTES_PER_S = 1_000_000
_REFUSED = (
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "Credentials",
    "Forbidden",
)
_USERINFO = re.compile(r"//[^/@\s]*@")


class FsspecStore(Store):
    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        client: str = "fsspec",
        *,
        impatient: bool = False,
    ) -> None:
        super().__init__(url)
        self._options, self._name = dict(options), client
        self._create_only: CreateOnly = "native"
        self._is_s3 = client == "s3fs"
        self._timeout_s = 4.0 if impatient else 120.0
        scheme = url.partition("://")[0]
        more = _s3fs_options(self._options, impatient) if self._is_s3 else self._options
        try:
            import fsspec

            self._fs: Any = fsspec.filesystem(
                scheme, **more, skip_instance_cache=True, use_listings_cache=False
            )
        except (ImportError, TypeError, ValueError) as error:
            raise StoreError(
                f"no client for {self.url}: {error}",
                hint="Install the fsspec package for it, and check the storage options' names.",
            ) from error
        self._root = str(self._fs._strip_protocol(self.url)).rstrip("/")

    def capabilities(self) -> Capabilities:
        return Capabilities(self._create_only, self._name)

    def _impatient(self) -> Store:
        return FsspecStore(self.url, self._options, self._name, impatient=True)

    def _condition_ignored(self) -> None:
        self._create_only = "none"

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _put(self, key: str, data: Buffer, create: bool) -> None:
        path = self._path(key)
        with self._said(key, put=True):
            if create and self._create_only == "none" and self._do("exists", path):
                raise FileExistsError(key)
            if not self._is_s3:
                self._fs.makedirs(self._fs._parent(path), exist_ok=True)
            mode = "create" if create and self._create_only == "native" else "overwrite"
            more = {"chunksize": _PART_BYTES} if self._is_s3 else {}
            self._do("pipe_file", path, bytes(data), mode=mode, **more)

    def _get(self, key: str, begin: int, end: int | None) -> bytes:
        with self._said(key):
            try:
                return bytes(self._do("cat_file", self._path(key), start=begin or None, end=end))
            except OSError as error:
                if error.errno == errno.EINVAL and begin:
                    return b""  # s3fs: the key ends before `begin`; get() says so
                raise

    def _list(self, prefix: str) -> list[Entry]:
        with self._said(prefix):
            try:
                found = self._do("find", self._path(prefix), detail=True)
            except FileNotFoundError:
                return []
            skip = len(self._root) + 1
            return [
                Entry(path[skip:], int(info["size"]), _modified(info))
                for path, info in found.items()
                if path.startswith(self._path(prefix) + "/")
            ]

    def _delete(self, key: str) -> None:
        try:
            with self._said(key):
                self._do("rm_file", self._path(key))
        except KeyMissing:
            return  # idempotent

    def _exists(self, key: str) -> bool:
        try:
            with self._said(key):
                return bool(self._do("info", self._path(key))["type"] == "file")
        except KeyMissing:
            return False

    def _do(self, verb: str, *args: Any, **options: Any) -> Any:
        """A verb of the file system with a deadline, where its client is one that can be given one.

        The clients' own time-outs do not bound everything: a server that never answers an
        "Expect: 100-continue" held s3fs for ever.
        """
        if not self._fs.async_impl:
            return getattr(self._fs, verb)(*args, **options)
        from fsspec.asyn import sync

        size = len(args[1]) if verb == "pipe_file" else 0
        timeout_s = self._timeout_s + size / _SLOWEST_BYTES_PER_S
        return sync(
            self._fs.loop, getattr(self._fs, f"_{verb}"), *args, timeout=timeout_s, **options
        )

    @contextmanager
    def _said(self, key: str, *, put: bool = False) -> Iterator[None]:
        """Clients of fsspec raise what they like; here it becomes one of ours, never lost."""
        try:
            yield
        except Exception as error:
            raise self._ours(error, key, put) from error

    def _ours(self, error: Exception, key: str, put: bool) -> StoreError:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        for value in (self._options.get(name) for name in ("key", "secret", "token", "password")):
            text = text.replace(value, "***") if isinstance(value, str) and value else text
        text = _USERINFO.sub("//", text)
        if isinstance(error, FileExistsError):
            return KeyExists(f"{key} is already in {self.url}")
        if "NoSuchBucket" in text or "bucket does not exist" in text:
            return NoSuchBucket(f"the bucket of {self.url} does not exist")
        if isinstance(error, FileNotFoundError):
            if put:
                return NoSuchBucket(f"{self.url} does not exist ({text})")
            return KeyMissing(f"{key} is not in {self.url}")
        if isinstance(error, PermissionError) or any(word in text for word in _REFUSED):
            return StoreRefused(f"{self.url} refuses the credentials ({text})")
        if isinstance(error, TimeoutError | ConnectionError) or "Connect" in text:
            return StoreUnreachable(f"{self.url} does not answer: {text}")
        return StoreError(f"{self.url}: {text}")


def _s3fs_options(options: Mapping[str, Any], impatient: bool) -> dict[str, Any]:
    """Bounds on waiting, and no checksums that servers other than AWS refuse."""
    config = {
        "connect_timeout": 2 if impatient else 5,
        "read_timeout": 3 if impatient else 60,
        "retries": {"max_attempts": 0 if impatient else 5, "mode": "standard"},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **(options.get("config_kwargs") or {}),
    }
    return {**options, "config_kwargs": config}


def _modified(info: Mapping[str, Any]) -> float:
    value = next(
        (info[k] for k in ("LastModified", "mtime", "modified", "created") if k in info), 0
    )
    return value.timestamp() if isinstance(value, datetime.datetime) else float(value)
