"""The code package: the same bytes for the same files, and nothing that was to stay at home."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from perdure.launchers import codepack
from perdure.launchers.codepack import Package, pack
from perdure.runtime.errors import UsageError


def fill(folder: Path) -> Path:
    for name in ("train.py", "lib/model.py", ".git_is_not_here", "__pycache__/a.pyc", "b.pyc"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "venv3" / "lib").mkdir(parents=True)
    (folder / "venv3" / "pyvenv.cfg").touch()
    (folder / "venv3" / "lib" / "big.py").touch()
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    return folder


def opened(package: Package) -> tarfile.TarFile:
    raw = zstandard.ZstdDecompressor().decompress(package.data)
    return tarfile.open(fileobj=io.BytesIO(raw))


def test_without_git_hidden_files_caches_and_environments_stay(tmp_path: Path) -> None:
    package = pack(str(fill(tmp_path)))
    with opened(package) as tar:
        assert tar.getnames() == ["lib/model.py", "run.sh", "train.py"]
        assert tar.getmember("run.sh").mode == 0o755
        assert {(m.mtime, m.uid, m.uname) for m in tar.getmembers()} == {(0, 0, "")}
    assert package.sha256 == hashlib.sha256(package.data).hexdigest()
    assert package.key == f"code/{package.sha256}.tar.zst"


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = fill(tmp_path / "one"), fill(tmp_path / "two")
    os.utime(two / "train.py", (1, 1))
    assert pack(str(one)).data == pack(str(two)).data
    (two / "train.py").write_text("other")
    assert pack(str(one)).sha256 != pack(str(two)).sha256


def test_in_a_checkout_git_decides(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / ".gitignore").write_text("lib/\nvenv3/\n*.pyc\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=20)
    with opened(pack(str(tmp_path))) as tar:
        assert tar.getnames() == [".git_is_not_here", ".gitignore", "run.sh", "train.py"]


def test_links_inside_stay_links_and_others_are_named(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "alias.py").symlink_to("train.py")
    (tmp_path / "data").symlink_to("/usr")
    package = pack(str(tmp_path))
    with opened(package) as tar:
        assert tar.getmember("alias.py").linkname == "train.py"
        assert "data" not in tar.getnames()
        tar.extractall(tmp_path / "out", filter="data")
    assert (tmp_path / "out" / "alias.py").read_text() == "train.py"
    assert package.notes == ("data -> /usr leads elsewhere and was left out",)


def test_too_much_is_refused_with_the_largest_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x" * 3000)
    monkeypatch.setattr(codepack, "MAX_BYTES", 2000)
    with pytest.raises(UsageError, match="the largest: weights.bin") as caught:
        pack(str(tmp_path))
    assert ".gitignore" in caught.value.hint
