"""One contract for all stores, and what an object store can do to us over a real connection.

moto's server gives the right answers; a small server of our own gives the wrong ones: refusals,
503s, bodies that end too early, connections that are dropped.
"""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perdure.checkpoint.errors import (
    ForkError,
    IntegrityError,
    KeyExists,
    KeyMissing,
    NoSuchBucket,
    StoreError,
    StoreRefused,
    StoreUnreachable,
)
from perdure.checkpoint.store import Capabilities, Store, open_store

STORES = ("file", "memory", "obstore", "s3fs")


@pytest.fixture(params=STORES)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    if request.param == "file":
        yield open_store(str(tmp_path / "deep" / "run"))
    elif request.param == "memory":
        yield open_store(f"memory://{tmp_path.name}")
    else:
        monkeypatch.setenv("PERDURE_S3_CLIENT", request.param)
        server = request.getfixturevalue("s3")
        opened = open_store(f"{server.bucket()}/some/run", server.options)
        assert opened.capabilities() == Capabilities("native", request.param)
        yield opened


def test_keys_hold_what_was_put(store: Store) -> None:
    store.put("a/b.json", b"first")
    store.put("a/b.json", memoryview(b"second"))
    store.put("a/empty", b"")
    assert store.get("a/b.json") == b"second"
    assert store.get("a/b.json", 2) == b"cond"
    assert store.get("a/b.json", 1, 4) == b"eco"
    assert store.get("a/b.json", 3, 3) == b""
    assert store.get("a/empty") == b""
    assert store.exists("a/b.json")
    assert not store.exists("a")
    assert not store.exists("a/b")


def test_a_range_that_is_not_there_is_no_short_answer(store: Store) -> None:
    store.put("k", b"0123456789")
    with pytest.raises(IntegrityError, match="cut short"):
        store.get("k", 5, 11)
    with pytest.raises(IntegrityError, match="cut short"):
        store.get("k", 20, 30)


def test_an_absent_key(store: Store) -> None:
    store.put("there", b"x")
    for begin, end in ((0, None), (3, None), (0, 4)):
        with pytest.raises(KeyMissing):
            store.get("a/nope", begin, end)
    store.delete("a/nope")
    store.delete("there")
    assert not store.exists("there")
    assert store.list() == []


def test_listing_is_by_whole_segments_sorted_and_deep(store: Store) -> None:
    for key in ("b/2", "b/10", "b/deep/er/1", "bb/1", "a"):
        store.put(key, key.encode())
    assert [entry.key for entry in store.list("b")] == ["b/10", "b/2", "b/deep/er/1"]
    assert [entry.key for entry in store.list("b/")] == ["b/10", "b/2", "b/deep/er/1"]
    assert [entry.key for entry in store.list()] == ["a", "b/10", "b/2", "b/deep/er/1", "bb/1"]
    assert store.list("nothing/here") == []
    entry = store.list("bb")[0]
    assert entry.size == 4
    assert abs(entry.modified_s - time.time()) < 120


def test_create_takes_a_key_once(store: Store) -> None:
    store.put("once", b"mine", create=True)
    with pytest.raises(KeyExists):
        store.put("once", b"yours", create=True)
    assert store.get("once") == b"mine"
    store.delete("once")
    store.put("once", b"again", create=True)
    assert store.get("once") == b"again"


def test_racing_creators_have_one_winner(store: Store) -> None:
    start = threading.Barrier(8)

    def race(number: int) -> bool:
        start.wait(30)
        try:
            store.put("race/key", str(number).encode(), create=True)
        except KeyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert won.count(True) == 1
    assert store.get("race/key") == str(won.index(True)).encode()


def test_a_probe_leaves_nothing(store: Store) -> None:
    store.probe()
    assert store.list() == []
    assert store.capabilities().create_only == "native"


def test_keys_that_could_leave_the_folder_are_refused(store: Store) -> None:
    for key in ("../x", "/x", "a//b", "a/./b", "", "a/../../b", "a b"):
        with pytest.raises(ValueError, match="not a key"):
            store.put(key, b"x")


def test_a_forked_child_is_told_so(store: Store) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            store.exists("x")
        except ForkError:
            os.write(writer, b"told")
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        assert answer.read() == b"told"
    assert os.waitpid(pid, 0)[1] == 0


def test_listings_are_complete_over_pages(s3) -> None:
    store = open_store(f"{s3.bucket()}/run", s3.options)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.put(f"many/{n:05d}", b"x"), range(1001)))
    assert [entry.key for entry in store.list("many")] == [f"many/{n:05d}" for n in range(1001)]


def test_a_large_object_goes_up_in_parts(s3) -> None:
    store = open_store(f"{s3.bucket()}/run", s3.options)
    data = os.urandom(1 << 20) * 33
    store.put("large", memoryview(data))
    assert store.list("")[0].size == len(data)
    assert store.get("large", 16 << 20, (16 << 20) + 100) == data[16 << 20 : (16 << 20) + 100]
    assert store.get("large") == data


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_a_missing_bucket_is_named(s3, client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_S3_CLIENT", client)
    store = open_store("s3://no-such-bucket-here/run", s3.options)
    with pytest.raises(NoSuchBucket, match="bucket of s3://no-such-bucket-here/run") as told:
        store.probe()
    assert "Create the bucket" in told.value.hint


def test_the_environment_names_server_and_keys(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"{s3.bucket()}/run")
    store.probe()
    store.put("k", b"v")
    assert store.get("k") == b"v"


class Server(http.server.ThreadingHTTPServer):
    """Answers from a list, one a request, the last one for ever: (status, body, bytes to send)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes, int]] = []
        self.seen: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.options = {"key": "AKIDSECRET", "secret": "tOpSeCrEt", "endpoint_url": self.endpoint}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # or "Expect: 100-continue" would never be answered
    server: Server

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append(self.command)
        answers = self.server.answers
        status, body, sent = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == 0:  # drop the connection without a word
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", '"x"')
        self.send_header("last-modified", "Tue, 24 Nov 2026 01:00:00 GMT")
        if self.command == "GET" and "range" in self.headers:
            self.send_header("content-range", f"bytes 0-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[:sent])
        self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def broken() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def refusal(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
@pytest.mark.parametrize("code", ["SignatureDoesNotMatch", "InvalidAccessKeyId", "AccessDenied"])
def test_refused_credentials_are_said_and_not_shown(
    broken: Server, client: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERDURE_S3_CLIENT", client)
    broken.answers = [(403, refusal(code), 1000)]
    store = open_store("s3://bucket/run", broken.options)
    began = time.monotonic()
    with pytest.raises(StoreRefused, match="refuses the credentials") as told:
        store.probe()
    assert time.monotonic() - began < 10
    assert broken.seen
    said = f"{told.value}{told.value.hint}{store!r}{store.url}"
    assert "tOpSeCrEt" not in said
    assert "AKIDSECRET" not in said
    assert "AWS_ACCESS_KEY_ID" in told.value.hint


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_a_dead_endpoint_is_found_out_in_time(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_S3_CLIENT", client)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, never listening: connections are refused
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        options = {"key": "k", "secret": "s3cr", "endpoint_url": endpoint}
        store = open_store("s3://bucket/run", options)
        began = time.monotonic()
        with pytest.raises(StoreUnreachable, match="does not answer") as told:
            store.probe()
        assert time.monotonic() - began < 10
    assert "endpoint" in told.value.hint


def test_an_endpoint_that_accepts_and_says_nothing_is_found_out_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = open_store("s3://b/run", {"key": "k", "secret": "s", "endpoint_url": endpoint})
        began = time.monotonic()
        with pytest.raises(StoreUnreachable):
            store.probe()
        assert time.monotonic() - began < 10


def test_503_and_dropped_connections_are_asked_again(broken: Server) -> None:
    store = open_store("s3://bucket/run", broken.options)
    broken.answers = [(503, refusal("SlowDown"), 1000), (0, b"", 0), (200, b"", 0)]
    store.put("k", b"v")
    assert broken.seen == ["PUT", "PUT", "PUT"]
    broken.answers = [(503, refusal("SlowDown"), 1000), (200, b"v", 10)]
    assert store.get("k") == b"v"


def test_a_truncated_body_is_never_taken_for_whole(broken: Server) -> None:
    store = open_store("s3://bucket/run", broken.options)
    body = bytes(range(256)) * 256
    broken.answers = [(206, body, 1000), (206, body, len(body))]
    try:
        data = store.get("k", 0, len(body))
    except StoreError:
        data = store.get("k", 0, len(body))
    assert data == body
    assert len(broken.seen) == 2  # the cut body did go out


def test_a_store_that_ignores_the_condition_is_found_out(broken: Server) -> None:
    store = open_store("s3://bucket/run", broken.options)
    broken.answers = [(200, b"", 0)]
    store.probe()
    assert store.capabilities().create_only == "none"
    with pytest.raises(KeyExists):  # HEAD says that it is there: looked first, at least
        store.put("k", b"v", create=True)
    assert broken.seen[-1] == "HEAD"


def test_a_conflict_that_leaves_nothing_is_tried_again(broken: Server) -> None:
    store = open_store("s3://bucket/run", broken.options)
    conflict = refusal("ConditionalRequestConflict")
    broken.answers = [(409, conflict, 1000), (404, b"", 0), (200, b"", 0)]
    store.put("k", b"v", create=True)
    assert broken.seen == ["PUT", "HEAD", "PUT"]


def test_urls_that_cannot_be_stores() -> None:
    with pytest.raises(StoreError, match="no client"):
        open_store("nosuchscheme://x/y")
    with pytest.raises(StoreError, match="names no bucket"):
        open_store("s3:///run")
    shown = open_store("s3://user:pass@bucket/run", {"key": "k", "secret": "s"})
    assert shown.url == "s3://bucket/run"


def test_the_keys_of_a_profile_are_used(
    s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "credentials"
    path.write_text("[lab]\naws_access_key_id = AKIDLAB\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    url = f"{s3.bucket()}/run"
    store = open_store(url, {"profile": "lab", "endpoint_url": s3.endpoint})
    store.probe()
    assert store.capabilities().client == "obstore"


def test_an_option_obstore_has_no_word_for_goes_to_s3fs(s3) -> None:
    options = {**s3.options, "default_block_size": 8 << 20}
    store = open_store(f"{s3.bucket()}/run", options)
    assert store.capabilities().client == "s3fs"
    store.probe()


def test_any_other_url_goes_through_fsspec(tmp_path: Path) -> None:
    store = open_store(f"local://{tmp_path}/run")
    assert store.capabilities() == Capabilities("native", "fsspec")
    store.probe()
    store.put("a/k", b"value", create=True)
    with pytest.raises(KeyExists):
        store.put("a/k", b"other", create=True)
    assert store.get("a/k", 1, 3) == b"al"
    assert [entry.key for entry in store.list("a")] == ["a/k"]
