"""Each mistake that can be seen before a rank starts: one message, naming what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import pytest

from perdure.checkpoint.store import open_store
from perdure.launchers import preflight
from perdure.runtime.errors import RunProblem, StoreProblem, UsageError
from perdure.runtime.spec import JobSpec


def spec(
    cwd: Path,
    *argv: str,
    entry: Literal["script", "module", "command"] = "script",
    store: str = "file:///x/r",
) -> JobSpec:
    return JobSpec(run="r", entry=entry, argv=argv, cwd=str(cwd), store=store)


def refusal(made: JobSpec) -> tuple[str, str]:
    with pytest.raises(UsageError) as caught:
        preflight.check_entry(made, here=True)
    return str(caught.value), caught.value.hint


def test_a_good_script_passes(tmp_path: Path) -> None:
    (tmp_path / "ok.py").write_text("# coding: latin-1\nx = '\\d'\n")  # a warning is no error
    preflight.check_entry(spec(tmp_path, "ok.py"), here=True)


def test_a_missing_script_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    what, hint = refusal(spec(tmp_path, "trian.py"))
    assert "no script trian.py" in what
    assert "did you mean train.py" in hint
    assert "folder sub is not there" in refusal(spec(tmp_path, "sub/x.py"))[1]
    assert "-m" in refusal(spec(tmp_path, "zzz"))[1]


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    assert "folder" in refusal(spec(tmp_path, "pkg"))[0]
    (tmp_path / "pkg" / "__main__.py").touch()
    assert "-m pkg" in refusal(spec(tmp_path, "pkg"))[1]


def test_a_script_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.py").touch()
    # root may read everything, so the system's answer is put in its place
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "may not be read" in refusal(spec(tmp_path, "x.py"))[0]


def test_a_syntax_error_is_shown_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import os\nfor x in [1, 2:\n    pass\n")
    what, _ = refusal(spec(tmp_path, "bad.py"))
    assert 'File "bad.py", line 2' in what
    assert "for x in [1, 2:" in what
    assert "^" in what
    assert "SyntaxError" in what


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"x = '\xff\xfe'\n")
    assert "bad.py" in refusal(spec(tmp_path, "bad.py"))[0]
    (tmp_path / "nul.py").write_bytes(b"x = 1\0\n")
    assert "nul.py" in refusal(spec(tmp_path, "nul.py"))[0]


def test_modules_are_found_and_not_imported(tmp_path: Path) -> None:
    package = tmp_path / "mypkg_preflight" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "__init__.py").touch()
    (package / "train.py").write_text("x = 1\n")
    made = spec(tmp_path, "mypkg_preflight.inner.train", entry="module")
    preflight.check_entry(made, here=True)
    assert "mypkg_preflight" not in sys.modules
    what, hint = refusal(spec(tmp_path, "mypkg_preflight.inner", entry="module"))
    assert "package without __main__" in what
    assert "-m mypkg_preflight.inner.train" in hint
    assert (
        "no module mypkg_preflight.nope"
        in refusal(spec(tmp_path, "mypkg_preflight.nope", entry="module"))[0]
    )
    (package / "train.py").write_text("x = (\n")
    assert "SyntaxError" in refusal(made)[0]


def test_modules_of_the_environment_are_found(tmp_path: Path) -> None:
    for name in ("http.server", "pytest", "this"):
        preflight.check_entry(spec(tmp_path, name, entry="module"), here=True)
    assert "leave -m out" in refusal(spec(tmp_path, "train.py", entry="module"))[1]
    # on other nodes it may well be there
    preflight.check_entry(spec(tmp_path, "nope_nope", entry="module"), here=False)


def test_commands(tmp_path: Path) -> None:
    preflight.check_entry(spec(tmp_path, "sh", "-c", "true", entry="command"), here=True)
    assert "PATH" in refusal(spec(tmp_path, "no-such-program", entry="command"))[0]
    assert "no program ./go.sh" in refusal(spec(tmp_path, "./go.sh", entry="command"))[0]
    (tmp_path / "go.sh").touch()
    assert "not executable" in refusal(spec(tmp_path, "./go.sh", entry="command"))[0]


def test_a_run_that_exists_is_not_written_over(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/r")
    preflight.check_new(store, "r")
    store.put("spec.json", b"{}")
    with pytest.raises(RunProblem, match="a run named r exists already"):
        preflight.check_new(store, "r")


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreProblem) as caught:
        preflight.open_probed(spec(tmp_path, "x.py", store=f"file://{tmp_path}/file/r"))
    assert caught.value.hint


def test_stores_that_cannot_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreProblem, match="memory of one process"):
        preflight.check_sharing(spec(tmp_path, "x.py", store="memory://a/r"), "local")
    monkeypatch.delenv("PERDURE_HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    own = spec(tmp_path, "x.py", store="file:///var/state/perdure/store/r")
    preflight.check_sharing(own, "local")
    with pytest.raises(StoreProblem, match="own state folder"):
        preflight.check_sharing(own, "ray")


def test_code_that_would_not_be_sent(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "out.py").touch()
    (tmp_path / "work" / "in.py").touch()
    preflight.check_inside(spec(tmp_path / "work", "in.py"))
    for argv in ("../out.py", str(tmp_path / "work" / "in.py")):
        with pytest.raises(UsageError):
            preflight.check_inside(spec(tmp_path / "work", argv))
