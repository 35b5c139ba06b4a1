"""What this machine remembers of its runs: whole, private, and honest about what it cannot read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perdure.launchers import records, runs
from perdure.launchers.records import RunRecord
from perdure.runtime.errors import RunProblem


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_HOME", str(tmp_path / "home"))


def record(run: str = "train-1", started: float = 1.0) -> RunRecord:
    return RunRecord(
        run=run,
        url=f"file:///runs/{run}",
        cluster="local",
        address=None,
        host="127.0.0.1",
        port=4000,
        pid=1,
        started=started,
        token="hush-hush",
        log_dir="/logs",
        cwd="/work",
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert records.read("train-1") is None
    records.write(record())
    assert records.read("train-1") == record()
    file = tmp_path / "home" / "runs" / "train-1.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(file.parent) == ["train-1.json"], "nothing half written is left"
    assert "hush-hush" not in repr(record())


def test_the_newest_run_is_listed_first() -> None:
    for run, started in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        records.write(record(run, started))
    assert [one.run for one in records.list_runs()] == ["b", "c", "a"]


@pytest.mark.parametrize("text", ["{", "[]", '{"run": "train-1"}'])
def test_a_broken_record_is_said_to_be_so(tmp_path: Path, text: str) -> None:
    records.write(record())
    records.write(record("whole"))
    (tmp_path / "home" / "runs" / "train-1.json").write_text(text)
    with pytest.raises(RunProblem, match="this machine's record of train-1 cannot be read"):
        records.read("train-1")
    assert [one.run for one in records.list_runs()] == ["whole"]


def test_a_run_is_found_by_id_or_url(tmp_path: Path) -> None:
    records.write(record())
    assert runs.find("train-1").url == "file:///runs/train-1"
    assert runs.find("file:///runs/train-1/").record == record()
    # a copy of the folder elsewhere is not what the record is about
    assert runs.find("s3://copy/train-1").record is None
    with pytest.raises(RunProblem, match="no run trian-1 .*did you mean train-1"):
        runs.find("trian-1")
    assert runs.find("./some/folder").url == f"file://{os.getcwd()}/some/folder"


def test_no_path_leads_out_of_the_records() -> None:
    records.write(record("train-1"))
    assert records.read("../../etc/train-1") == record("train-1")
