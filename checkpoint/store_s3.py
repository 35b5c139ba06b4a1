"""S3 and what speaks like it, through obstore: a Rust client that copies nothing and holds no GIL.

It costs a tenth of the processor time that s3fs does (docs/checkpoint-format.md says where that was
measured). s3fs takes over where obstore cannot be imported, where an option has no word in obstore,
or where `PERDURE_S3_CLIENT=s3fs` asks for it.

Choices that are not obstore's defaults, and why:
- payloads are not signed: TLS protects them on the way, our own crc32c blocks from end to end, and
  hashing every byte with sha256 would cost more than sending it;
- an endpoint of one's own is spoken to in path style and may be plain http;
- deletes are single requests: some servers lack the bulk form;
- one request may take 60 s and all its retries 120 s together, so that no thread waits for ever;
  a probe is given 6 s.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote, urlsplit

from perdure.checkpoint.errors import (
    KeyExists,
    KeyMissing,
    NoSuchBucket,
    StoreError,
    StoreRefused,
    StoreUnreachable,
)
from perdure.checkpoint.store import Buffer, Capabilities, CreateOnly, Entry, Store

if TYPE_CHECKING:
    from obstore.store import S3Store as Client

CLIENT_VARIABLE = "PERDURE_S3_CLIENT"
PART_BYTES = 16 * 1024 * 1024
PARTS_MAX = 9_000  # S3 allows 10,000
PARTS_AT_ONCE = 8
CONFLICT_TRIES = 5

_TRUE = (True, "1", "true", "True")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_USERINFO = re.compile(r"//[^/@\s]*@")
# Where the environment itself says how to sign, obstore finds it.
_SIGNING_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_REFUSED = (
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
)


def open_s3(url: str, options: Mapping[str, Any]) -> Store:
    """obstore's store, or s3fs's where obstore cannot do it. Options in s3fs's spelling."""
    asked = os.environ.get(CLIENT_VARIABLE, "obstore")
    if asked not in ("obstore", "s3fs"):
        raise StoreError(f"{CLIENT_VARIABLE}={asked}", hint="It is obstore or s3fs.")
    config, unknown = _translated(options)
    if asked == "obstore" and not unknown:
        try:
            import obstore  # noqa: F401
        except ImportError:
            pass  # s3fs then, and capabilities() says so
        else:
            return S3Store(url, config, _botocore_credentials(options))
    from perdure.checkpoint.store_fsspec import FsspecStore

    return FsspecStore(url, options, client="s3fs")


class S3Store(Store):
    def __init__(
        self,
        url: str,
        config: Mapping[str, Any],
        credentials: Callable[[], Any] | None = None,
        *,
        impatient: bool = False,
    ) -> None:
        super().__init__(url)
        parts = urlsplit(self.url)
        self._bucket, self._prefix = parts.netloc, unquote(parts.path).strip("/")
        if not self._bucket:
            raise StoreError(f"{self.url} names no bucket", hint="Write s3://bucket/folder.")
        self._config, self._credentials = dict(config), credentials
        self._create_only: CreateOnly = "native"
        self._client = self._connect(impatient)

    def _connect(self, impatient: bool) -> Client:
        from obstore.store import S3Store as Client

        config = {
            "region": "us-east-1",
            "unsigned_payload": True,
            "disable_bulk_delete": True,
            "conditional_put": "etag",
            "virtual_hosted_style_request": (
                "endpoint" not in self._config and "." not in self._bucket
            ),
            **self._config,
        }
        insecure = config.pop("allow_invalid_certificates", False)
        plain = str(config.get("endpoint", "")).startswith("http://")
        extra: dict[str, Any] = {"prefix": self._prefix} if self._prefix else {}
        if self._credentials is not None:
            extra["credential_provider"] = self._credentials
        return Client(
            self._bucket,
            config=config,  # type: ignore[arg-type]
            client_options={
                "allow_http": plain,
                "allow_invalid_certificates": insecure,
                "connect_timeout": "2s" if impatient else "5s",
                "timeout": "3s" if impatient else "60s",
            },
            retry_config={
                "max_retries": 2 if impatient else 12,
                "retry_timeout": timedelta(seconds=5 if impatient else 120),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=1 if impatient else 10),
                    "base": 2,
                },
            },
            **extra,
        )

    def capabilities(self) -> Capabilities:
        return Capabilities(self._create_only, "obstore")

    def _impatient(self) -> Store:
        return S3Store(self.url, self._config, self._credentials, impatient=True)

    def _condition_ignored(self) -> None:
        self._create_only = "none"

    def _put(self, key: str, data: Buffer, create: bool) -> None:
        import obstore

        if create and self._create_only == "none":
            if self._exists(key):
                raise KeyExists(f"{key} is already in {self.url}")
            create = False
        if create:
            self._create(key, data)
            return
        size = memoryview(data).nbytes
        with self._said(key):
            obstore.put(
                self._client,
                key,
                data,
                use_multipart=size > PART_BYTES,
                chunk_size=max(PART_BYTES, -(-size // PARTS_MAX)),
                max_concurrency=PARTS_AT_ONCE,
            )

    def _create(self, key: str, data: Buffer) -> None:
        """In one request: a condition on a multipart upload is judged only after all was sent."""
        import obstore

        for attempt in range(CONFLICT_TRIES):
            try:
                with self._said(key):
                    obstore.put(self._client, key, data, mode="create", use_multipart=False)
                return
            except KeyExists:
                # S3 also answers 409 while another request for the key is under way: then nobody
                # may have it in the end, and the one who asks again gets it.
                if self._exists(key):
                    raise
            time.sleep(0.05 * 2**attempt)
        raise StoreError(f"{key}: refused {CONFLICT_TRIES} times as taken, and is not there")

    def _get(self, key: str, begin: int, end: int | None) -> bytes:
        import obstore

        with self._said(key):
            if begin == 0 and end is None:
                return bytes(obstore.get(self._client, key).bytes())
            if end is None:
                got = obstore.get(self._client, key, options={"range": {"offset": begin}})
                return bytes(got.bytes())
            try:
                return bytes(obstore.get_range(self._client, key, start=begin, end=end))
            except obstore.exceptions.BaseError as error:
                if "status code: 416" in str(error):
                    return b""  # the key ends before `begin`; get() says so
                raise

    def _list(self, prefix: str) -> list[Entry]:
        import obstore

        found: list[Entry] = []
        with self._said(prefix):
            for page in obstore.list(self._client, prefix or None, chunk_size=1000):
                found += [
                    Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())
                    for meta in page
                ]
        return found

    def _delete(self, key: str) -> None:
        import obstore

        try:
            with self._said(key):
                obstore.delete(self._client, key)
        except KeyMissing:
            return  # idempotent; some servers answer 404 where S3 answers 204

    def _exists(self, key: str) -> bool:
        import obstore

        try:
            with self._said(key):
                obstore.head(self._client, key)
        except KeyMissing:
            return False
        return True

    @contextmanager
    def _said(self, key: str) -> Iterator[None]:
        """obstore's errors in our words. It raises FileNotFoundError beside those of its own."""
        import obstore

        try:
            yield
        except (obstore.exceptions.BaseError, OSError) as error:
            _raise_ours(self._without_secrets(str(error)), key, self.url, error)

    def _without_secrets(self, text: str) -> str:
        for name in ("access_key_id", "secret_access_key", "session_token"):
            if secret := str(self._config.get(name) or ""):
                text = text.replace(secret, "***")
        return _USERINFO.sub("//", text)


def _raise_ours(text: str, key: str, url: str, error: Exception) -> NoReturn:
    from obstore.exceptions import AlreadyExistsError

    code = found[1] if (found := _CODE.search(text)) else ""
    status = int(found[1]) if (found := _STATUS.search(text)) else 0
    said = f"{status} {code}".strip() if status else text.splitlines()[0][:300]
    if code == "NoSuchBucket":
        raise NoSuchBucket(f"the bucket of {url} does not exist") from error
    if isinstance(error, AlreadyExistsError):
        raise KeyExists(f"{key} is already in {url}") from error
    if isinstance(error, FileNotFoundError):
        raise KeyMissing(f"{key} is not in {url}") from error
    if status in (401, 403) or code in _REFUSED:
        raise StoreRefused(f"{url} refuses the credentials ({said})") from error
    if "instance metadata" in text.lower() or "169.254." in text:
        raise StoreRefused(f"no credentials were found for {url}") from error
    if status in (301, 307) or "incorrectly configured region" in text:
        raise StoreError(
            f"the bucket of {url} is in another region",
            hint="Set AWS_REGION to the bucket's region.",
        ) from error
    if not status or status >= 500 or status in (408, 429):
        raise StoreUnreachable(f"{url} does not answer: {said}") from error
    raise StoreError(f"{url} answered {said} for {key}") from error


def _translated(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """s3fs's options and the environment as obstore's; and those that it has no word for."""
    left = dict(options)
    more = dict(left.pop("client_kwargs", None) or {})
    deeper = dict((left.pop("config_kwargs", None) or {}).get("s3") or {})
    left.pop("profile", None)  # _botocore_credentials reads it
    found = {
        "access_key_id": left.pop("key", None),
        "secret_access_key": left.pop("secret", None),
        "session_token": left.pop("token", None),
        "skip_signature": left.pop("anon", None) in _TRUE or None,
        "request_payer": left.pop("requester_pays", None) in _TRUE or None,
        "endpoint": left.pop("endpoint_url", None)
        or more.pop("endpoint_url", None)
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL"),
        "region": more.pop("region_name", None)
        or os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION"),
        "allow_invalid_certificates": more.pop("verify", True) in (False, "false", "False") or None,
    }
    if (style := deeper.pop("addressing_style", None)) in ("path", "virtual"):
        found["virtual_hosted_style_request"] = style == "virtual"
    left.pop("use_ssl", None)  # the endpoint's own scheme says it
    unknown = [*left, *more, *deeper]
    return {name: value for name, value in found.items() if value is not None}, unknown


def _botocore_credentials(options: Mapping[str, Any]) -> Callable[[], Any] | None:
    """The keys of ~/.aws, which obstore does not read, refreshed by botocore when they expire."""
    if options.get("key") or options.get("anon") in _TRUE:
        return None
    profile = options.get("profile") or os.environ.get("AWS_PROFILE")
    if not profile:
        if any(os.environ.get(name) for name in _SIGNING_VARIABLES):
            return None
        home = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
        if not home.expanduser().exists():
            return None
    import botocore.session  # type: ignore[import-untyped]

    found = botocore.session.Session(profile=profile).get_credentials()
    if found is None:
        raise StoreRefused(f"the profile {profile or 'default'!r} of ~/.aws holds no credentials")

    def current() -> dict[str, Any]:
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(found, "_expiry_time", None),
        }

    return current
