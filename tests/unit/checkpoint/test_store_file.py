"""What is special about a folder as a store. The contract is in tests/integration."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perdure.checkpoint import store_file
from perdure.checkpoint.errors import (
    CheckpointError,
    KeyExists,
    KeyMissing,
    NoSuchBucket,
    StoreError,
    StoreUnreachable,
)
from perdure.checkpoint.store import Capabilities, open_store, without_userinfo


def test_a_crash_in_mid_put_leaves_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"file://{tmp_path}/run")
    store.put("a/k", b"old")
    synced: list[int] = []

    def fails(descriptor: int) -> None:
        synced.append(descriptor)
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(store_file.os, "fsync", fails)
        with pytest.raises(StoreError, match="I/O error"):
            store.put("a/k", b"new")
    assert synced
    assert store.get("a/k") == b"old"
    assert [path.name for path in (tmp_path / "run" / "a").iterdir()] == ["k"]


def test_leftovers_of_a_crash_are_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a/k", b"x")
    (tmp_path / "a" / ".tmp-0123").write_bytes(b"half")
    assert [entry.key for entry in store.list()] == ["a/k"]


def test_without_hard_links_a_claim_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(store_file.os, "link", no_links)
    store = open_store(str(tmp_path))
    store.put("k", b"mine", create=True)
    with pytest.raises(KeyExists):
        store.put("k", b"yours", create=True)
    assert store.get("k") == b"mine"
    assert store.capabilities() == Capabilities("lock", "file")
    os.unlink(tmp_path / "k")  # as if the winner had died between its claim and its rename
    with pytest.raises(KeyExists):
        store.put("k", b"yours", create=True)
    store.delete("k")
    store.put("k", b"free again", create=True)
    assert [entry.key for entry in store.list()] == ["k"]


def test_a_lost_answer_to_a_link_is_not_a_lost_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def answers_twice(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "the retry finds the first one's work")

    monkeypatch.setattr(store_file.os, "link", answers_twice)
    store = open_store(str(tmp_path))
    store.put("k", b"mine", create=True)
    assert store.get("k") == b"mine"


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    store = open_store(str(tmp_path / "run"))
    with pytest.raises(NoSuchBucket, match=r"run cannot be written") as told:
        store.probe()
    assert "must be a folder" in told.value.hint
    with pytest.raises(KeyMissing):
        store.get("k")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_file.os, "replace", full)
    with pytest.raises(StoreError, match="No space left") as told:
        open_store(str(tmp_path)).put("k", b"x")
    assert "Free space" in told.value.hint


def test_opening_a_file_store_imports_no_client() -> None:
    script = (
        "import sys; from perdure.checkpoint.store import open_store; open_store('/tmp/x');"
        "print([m for m in ('fsspec', 's3fs', 'obstore', 'botocore', 'torch') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_userinfo_leaves_a_url() -> None:
    assert without_userinfo("s3://key:secret@bucket/run") == "s3://bucket/run"
    assert without_userinfo("s3://bucket/run@5") == "s3://bucket/run@5"
    assert without_userinfo("/data/a@b") == "/data/a@b"


def test_the_base_error_is_never_raised_itself() -> None:
    with pytest.raises(TypeError):
        CheckpointError("something happened")
    error = StoreUnreachable("nobody answers")
    assert error.hint
    assert StoreUnreachable("nobody answers", hint="call Bob").hint == "call Bob"
