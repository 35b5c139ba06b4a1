"""The store: seven verbs over keys, the same for a folder, a dictionary and an object store.

What every store promises, and the contract test holds all of them to:

- `put` is atomic: under a key lies all of one put or all of another, never a part. A put that
  raised StoreUnreachable may still have gone through.
- `put(create=True)` lets one of several racing puts through and refuses the others with KeyExists.
  How it can promise that is `capabilities().create_only`: "native" (the store's own condition),
  "lock" (a claim beside the key), or "none" (looked first, then put: not safe in a race).
  After a lost answer a retry of one's own put may be refused: who must know puts something unique
  in the data and reads it back.
- `get` returns exactly the bytes asked for or raises; `list` is complete and sorted.
- Every call has a deadline. A store that answers 503 or drops connections is asked again, with
  jitter, until that deadline.
- A client made before a fork raises ForkError in the child: there it would hang for ever.
- No credential appears in a message, a repr or a URL.

Keys are relative paths with "/"; a prefix is whole segments of one ("checkpoints/commits"). Clients
are imported when a URL asks for them: the command line opens a file:// store without any.
"""

from __future__ import annotations

import abc
import os
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit, urlunsplit

from perdure.checkpoint.errors import (
    ForkError,
    IntegrityError,
    KeyExists,
    KeyMissing,
    StoreError,
)

Buffer = bytes | bytearray | memoryview
CreateOnly = Literal["native", "lock", "none"]
PROBE_DEADLINE_S = 10.0
_SEGMENT = re.compile(r"[A-Za-z0-9_.=@+,-]+")


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    size: int  # bytes
    modified_s: float  # seconds since the epoch, on the store's clock


@dataclass(frozen=True, slots=True)
class Capabilities:
    create_only: CreateOnly
    client: str  # what does the work: "file", "memory", "obstore", "s3fs", "fsspec"


class Store(abc.ABC):
    """One folder of a store. Thread-safe; for the process that made it."""

    def __init__(self, url: str) -> None:
        self.url = without_userinfo(url)
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        """Store `data` under `key`. With `create`, raises KeyExists when the key is taken."""
        self._check(key)
        self._put(key, data, create)

    def get(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end) of the key. Raises KeyMissing, and IntegrityError when it is shorter."""
        self._check(key)
        if end is not None and not 0 <= begin <= end:
            raise ValueError(f"a range from {begin} to {end}")
        if begin == end:
            return b""
        data = self._get(key, begin, end)
        if end is not None and len(data) != end - begin:
            raise IntegrityError(
                f"{key} is cut short: bytes {begin} to {end} asked for, {len(data)} there", key=key
            )
        return data

    def list(self, prefix: str = "") -> list[Entry]:
        """Everything below `prefix`, at any depth, sorted by key. An absent prefix is empty."""
        prefix = prefix.rstrip("/")
        self._check(prefix or "any")
        return sorted(self._list(prefix), key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        """Idempotent: a key that is not there is deleted."""
        self._check(key)
        self._delete(key)

    def exists(self, key: str) -> bool:
        self._check(key)
        return self._exists(key)

    @abc.abstractmethod
    def capabilities(self) -> Capabilities: ...

    def probe(self) -> None:
        """Find out within 10 s whether the store can be used, before anything relies on it.

        Two conditional puts of one fresh key: the second must be refused. Where it is not, the
        store ignores the condition and `capabilities()` says "none" from then on. Raises
        StoreUnreachable, StoreRefused, NoSuchBucket or another StoreError.
        """
        key = f".perdure-probe/{uuid.uuid4().hex}"
        deadline = time.monotonic() + PROBE_DEADLINE_S
        client = self._impatient()
        client.put(key, b"first", create=True)
        try:
            client.put(key, b"second", create=True)
        except KeyExists:
            refused = True
        else:
            refused = False
        client.delete(key)
        if not refused:
            self._condition_ignored()
        if time.monotonic() > deadline:
            raise StoreError(
                f"the store at {self.url} answers, but took more than {PROBE_DEADLINE_S:.0f} s "
                "for three small requests",
                hint="A run would stall on it: look at the network to the store and at its load.",
            )

    def close(self) -> None:
        """Free what the client holds. Idempotent."""
        return

    def _impatient(self) -> Store:
        """This store with deadlines so short that a probe ends in time."""
        return self

    def _condition_ignored(self) -> None:
        """A conditional put went through that must not: remember it."""
        raise StoreError(f"{self.url} let two create-only puts of one key through")

    def _check(self, key: str) -> None:
        if os.getpid() != self._pid:
            raise ForkError(f"the store {self.url} was opened before this process was forked")
        if not all(_SEGMENT.fullmatch(part) and part not in (".", "..") for part in key.split("/")):
            raise ValueError(f"{key!r} is not a key: segments of letters, digits and _.=@+,-")

    @abc.abstractmethod
    def _put(self, key: str, data: Buffer, create: bool) -> None: ...

    @abc.abstractmethod
    def _get(self, key: str, begin: int, end: int | None) -> bytes: ...

    @abc.abstractmethod
    def _list(self, prefix: str) -> Sequence[Entry]: ...

    @abc.abstractmethod
    def _delete(self, key: str) -> None: ...

    @abc.abstractmethod
    def _exists(self, key: str) -> bool: ...


class MemoryStore(Store):
    """For tests and trials in one process: two that open the same URL see the same keys."""

    _all: ClassVar[dict[str, dict[str, tuple[bytes, float]]]] = {}
    _lock = threading.Lock()

    def __init__(self, url: str) -> None:
        super().__init__(url)
        with self._lock:
            self._keys = self._all.setdefault(self.url.rstrip("/"), {})

    def capabilities(self) -> Capabilities:
        return Capabilities("native", "memory")

    def _put(self, key: str, data: Buffer, create: bool) -> None:
        with self._lock:
            if create and key in self._keys:
                raise KeyExists(f"{key} is already in {self.url}")
            self._keys[key] = (bytes(data), time.time())

    def _get(self, key: str, begin: int, end: int | None) -> bytes:
        with self._lock:
            if key not in self._keys:
                raise KeyMissing(f"{key} is not in {self.url}")
            return self._keys[key][0][begin:end]

    def _list(self, prefix: str) -> list[Entry]:
        with self._lock:
            return [
                Entry(key, len(data), at)
                for key, (data, at) in self._keys.items()
                if not prefix or key.startswith(prefix + "/")
            ]

    def _delete(self, key: str) -> None:
        with self._lock:
            self._keys.pop(key, None)

    def _exists(self, key: str) -> bool:
        with self._lock:
            return key in self._keys


def open_store(url: str, storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store at `url`: a path or file://, memory://, s3://, or any URL that fsspec knows.

    `storage_options` are spelled as s3fs spells them (key, secret, token, endpoint_url,
    client_kwargs, ...); AWS_* variables of the environment are honoured. Nothing is sent yet: call
    `probe()` to find out whether the store can be used. Raises StoreError on a URL that cannot be.
    """
    options = dict(storage_options or {})
    scheme, _, rest = url.partition("://")
    if not rest:
        scheme, rest = "file", url
    if scheme == "file":
        from perdure.checkpoint.store_file import FileStore

        return FileStore(rest)
    if scheme == "memory":
        return MemoryStore(url)
    if scheme in ("s3", "s3a"):
        from perdure.checkpoint.store_s3 import open_s3

        return open_s3(url, options)
    from perdure.checkpoint.store_fsspec import FsspecStore

    return FsspecStore(url, options)


def without_userinfo(url: str) -> str:
    """`url` without what stands before an @ in its host: that may be a password."""
    if "@" not in url or "://" not in url or url.startswith(("file://", "memory://")):
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
