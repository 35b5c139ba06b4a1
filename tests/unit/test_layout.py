"""The folders at the top are the package: five committed links, and nothing else in a wheel."""

from __future__ import annotations

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import perdure

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "checkpoint", "health", "launchers", "runtime")


def test_each_link_is_its_folder() -> None:
    """Fails where git was told not to make links: the install would succeed, the import not."""
    links = {path.name for path in (ROOT / ".src/perdure").iterdir() if path.is_symlink()}
    assert links == set(FOLDERS)
    for name in FOLDERS:
        assert (ROOT / ".src/perdure" / name).samefile(ROOT / name)


def test_the_package_is_typed_and_versioned() -> None:
    assert (ROOT / ".src/perdure/py.typed").exists()
    assert f'version = "{perdure.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {perdure.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_tests_run_this_tree() -> None:
    """An installed copy, or a stale build, would make every green test worthless."""
    assert Path(perdure.__path__[0]).samefile(ROOT / ".src/perdure")


def test_public_names_are_lazy_and_complete() -> None:
    for name in perdure.__all__:
        assert getattr(perdure, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'submitt'"):
        perdure.submitt  # type: ignore[attr-defined]  # noqa: B018


def test_a_module_of_the_user_does_not_shadow_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script's own `checkpoint.py` beside it comes first on the path."""
    (tmp_path / "checkpoint.py").write_text("raise RuntimeError('the user module was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("perdure.checkpoint").__name__ == "perdure.checkpoint"


@pytest.mark.slow
def test_the_wheel_holds_the_package_only(tmp_path: Path) -> None:
    """Built as pip would, without its isolation (no network), from the committed layout."""
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    result = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"perdure", f"perdure-{perdure.__version__}.dist-info"}
    for folder in FOLDERS:
        assert f"perdure/{folder}/__init__.py" in names
    assert "perdure/py.typed" in names
