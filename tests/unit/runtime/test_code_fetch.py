"""A code package is verified before anything of it is written, and cannot leave its folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
import zstandard

from perdure.runtime.code_fetch import unpack


def package(*entries: tuple[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return zstandard.ZstdCompressor().compress(raw.getvalue())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_it_is_unpacked_whole_and_may_be_there_already(tmp_path: Path) -> None:
    data = package(("a.py", b"1"), ("b/c.py", b"2"))
    target = tmp_path / "code" / "x"
    for _ in range(2):
        unpack(data, sha256(data), str(target))
    assert (target / "b" / "c.py").read_bytes() == b"2"
    assert [path.name for path in target.parent.iterdir()] == ["x"]


def test_altered_bytes_are_refused(tmp_path: Path) -> None:
    data = package(("a.py", b"1"))
    with pytest.raises(ValueError, match="sha256"):
        unpack(data + b"x", sha256(data), str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_leads_out_is_refused(tmp_path: Path) -> None:
    data = package(("../../evil.py", b"1"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(data, sha256(data), str(tmp_path / "code" / "x"))
    assert not list(tmp_path.rglob("evil.py"))
