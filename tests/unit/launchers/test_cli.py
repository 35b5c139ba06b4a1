"""The entry: what is a mistake of the user is one message and a code, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perdure.checkpoint.errors import FormatError
from perdure.launchers import commands_run
from perdure.launchers.cli import main
from perdure.launchers.options import Given
from perdure.runtime import journal


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rnu train.py", "no command rnu; did you mean run?"),
        ("train.py", "to run a script: perdure run"),
        ("precheck", "`perdure precheck` is not built yet"),
        ("run", "no script was given"),
        ("run --nnodez 1 train.py", "did you mean --nnodes?"),
        ("status nope", "no run nope was started on this machine"),
        ("why", "no run was given"),
        ("stop nope", "no run nope"),
        ("resume file:///nowhere/at-all", "there is no run at file:///nowhere/at-all"),
        ("events a b", "one word too many"),
    ],
)
def test_mistakes(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert "what to do: " in err
    assert "Traceback" not in err
    assert out == ""


def test_mistakes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "nope"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 2
    assert "nope" in told["error"]
    assert told["hint"]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["run", "-h"], ["help", "resume"], ["--version"]):
        assert main(words) == 0
        assert capsys.readouterr().out
    assert main([]) == 2


def test_a_dry_run_prints_the_spec_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--dry-run", "--standalone", "--nproc-per-node", "3", "x.py", "-h"]) == 0
    out, err = capsys.readouterr()
    spec = json.loads(out)
    assert (spec["nproc_per_node"], spec["argv"]) == (3, ["x.py", "-h"])
    assert "--standalone has no effect" in err
    assert not (tmp_path / "home").exists()


def test_no_runs_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert "no run was started" in capsys.readouterr().out
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


def test_a_journal_that_was_altered_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"kind": "note", "at": 1.0, "text": "x"}
    whole = journal.seal([line])
    (tmp_path / "r" / "journal").mkdir(parents=True)
    (tmp_path / "r" / "spec.json").write_text("{}")
    segment = tmp_path / "r" / "journal" / "000001-000000001.jsonl"
    segment.write_bytes(whole)
    url = f"file://{tmp_path}/r"
    assert main(["events", url]) == 0
    assert capsys.readouterr().out.rstrip().endswith("  x")
    for damaged in (whole[:-9], whole.replace(b'"x"', b'"y"')):
        segment.write_bytes(damaged)
        for command in ("status", "why", "events"):
            assert main([command, url]) == 2
            assert "journal/000001-000000001.jsonl: it was" in capsys.readouterr().err
    assert main(["resume", url]) == 2
    assert "the spec cannot be read" in capsys.readouterr().err


def test_what_the_checkpoint_folder_refuses_is_a_message_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(given: Given) -> int:
        raise FormatError("manifest.json is cut short")

    monkeypatch.setitem(commands_run.RUNNERS, "run", refuse)
    assert main(["run", "x.py"]) == 2
    assert "perdure: manifest.json is cut short" in capsys.readouterr().err
