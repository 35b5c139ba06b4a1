"""The command line's vocabulary: pinned, complete against torchrun, and never silent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perdure.launchers import settings, torchrun_options
from perdure.launchers.option_table import COMMANDS
from perdure.launchers.options import Given, parser, read
from perdure.launchers.settings import Plan, plan
from perdure.runtime.errors import UsageError

RUN = COMMANDS["run"]
_NAMES = """
cluster code config device dry-run duplicate-stderr-filters duplicate-stdout-filters env env-file
event-log-handler from json local-addr local-ranks-filter log-dir logs-specs master-addr master-port
max-restarts module monitor-interval name nnodes no-python no-warm node-rank nproc-per-node
numa-binding output precheck rdzv-backend rdzv-conf rdzv-endpoint rdzv-id redirects role run-path
save-every shutdown-timeout signals-to-handle spares standalone start-method store tag tee
virtual-local-rank
"""
LAUNCH_OPTIONS = _NAMES.split()
NOT_ON_RESUME = {"code", "module", "name", "no-python", "run-path", "store"}


def said(*words: str, environ: dict[str, str] | None = None) -> Given:
    return read(RUN, words, environ or {})


def planned(*words: str, **environ: str) -> Plan:
    return plan(said(*words), {"HOME": "/home/u", **environ}, "/work", 1_700_000_000.0)


def refused(*words: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        planned(*words, "train.py")
    assert caught.value.hint, "a refusal says what to do"
    return caught.value


def test_the_set_of_options_is_this_one() -> None:
    """A new option is a promise for years: add it here too, on purpose."""
    names = {name: sorted(o.name for o in c.options) for name, c in COMMANDS.items()}
    resumable = [name for name in LAUNCH_OPTIONS if name not in NOT_ON_RESUME]
    assert names == {
        "run": LAUNCH_OPTIONS,
        "submit": LAUNCH_OPTIONS,
        "resume": sorted([*resumable, "step", "takeover"]),
        "stop": ["json", "now"],
        "save": ["json"],
        "status": ["json"],
        "why": ["json"],
        "logs": ["follow", "rank"],
        "events": ["follow", "json"],
    }


@pytest.mark.slow
def test_every_option_of_torchrun_is_known_here() -> None:
    from torch.distributed.run import get_args_parser

    theirs = {
        s.removeprefix("--").replace("_", "-")
        for action in get_args_parser()._actions
        for s in action.option_strings
        if s.startswith("--")
    }
    ours = {o.name for o in RUN.options}
    assert theirs - ours == {"help"}
    # and each is taken over, or judged: none falls through
    judged = set(torchrun_options.ACCEPTED) | set(torchrun_options.REFUSED)
    assert judged == {o.dest for o in RUN.options if o.group == "torchrun"}


@pytest.mark.parametrize("spelling", ["--nproc-per-node", "--nproc_per_node"])
@pytest.mark.parametrize("glue", [True, False])
def test_dashes_underscores_and_equals_signs(spelling: str, glue: bool) -> None:
    words = [f"{spelling}=2"] if glue else [spelling, "2"]
    assert planned(*words, "train.py").spec.nproc_per_node == 2


def test_what_follows_the_script_is_the_script_s() -> None:
    given = said("--nnodes", "1", "train.py", "--nnodes", "7", "-m", "--help")
    assert (given.target, given.args) == ("train.py", ("--nnodes", "7", "-m", "--help"))
    assert given.values == {"nnodes": "1"}


def test_an_unknown_option_names_its_neighbour() -> None:
    with pytest.raises(
        UsageError, match="no option --nproc-per-nod; did you mean --nproc-per-node"
    ):
        said("--nproc-per-nod", "2", "train.py")
    with pytest.raises(UsageError, match="no option --max"):  # abbreviations are not guessed
        said("--max", "2", "train.py")


def test_an_option_without_its_value() -> None:
    with pytest.raises(UsageError, match="--nnodes"):
        said("--nnodes")


def test_pet_variables_are_defaults_as_under_torchrun() -> None:
    environ = {"PET_NPROC_PER_NODE": "4", "PET_MAX_RESTARTS": "3", "PET_NO_PYTHON": "1"}
    given = said("--max-restarts", "5", "./go.sh", environ=environ)
    spec = plan(given, environ, "/work", 0.0).spec
    assert (spec.nproc_per_node, spec.max_restarts, spec.entry) == (4, 5, "command")


def test_a_bad_pet_variable_is_named() -> None:
    given = said("train.py", environ={"PET_NNODES": "many"})
    with pytest.raises(UsageError, match=r"--nnodes \(from PET_NNODES\) 'many'"):
        plan(given, {}, "/work", 0.0)
    with pytest.raises(UsageError, match="PET_MODULE='yes' is neither 0 nor 1"):
        said("train.py", environ={"PET_MODULE": "yes"})


def test_a_variable_of_ours_that_torchrun_lacks_is_not_read() -> None:
    assert said("train.py", environ={"PET_SPARES": "1", "PET_JSON": "1"}).values == {}


def test_config_file_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(
        'nproc-per-node = 2\nsave_every = 50\nno-warm = true\n[env]\nA = "1"\n[tag]\nteam = "x"\n'
    )
    spec = planned("--config", str(file), "--save-every", "70", "--env", "B=2", "t.py").spec
    assert (spec.nproc_per_node, spec.save_every_steps, spec.warm) == (2, 70, False)
    assert (spec.env, spec.tags) == ({"A": "1", "B": "2"}, {"team": "x"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nproc = 2\n", "has no use for 'nproc'; did you mean nproc-per-node"),
        ("nnodes = [1]\n", "nnodes = .* should be a text or a number"),
        ('no-warm = "yes"\n', "should be true or false"),
        ("nnodes = \n", "Invalid value"),
    ],
)
def test_a_config_file_that_does_not_fit(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "job.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        said("--config", str(file), "train.py")


def test_a_config_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="No such file"):
        said("--config", "/nowhere/job.toml", "train.py")


@pytest.mark.parametrize(
    "words",
    [
        ["--nnodes", "1:4"],
        ["--nnodes", "two"],
        ["--nnodes", "0"],
        ["--nnodes", "2"],  # a local run has one machine
        ["--spares", "1"],
        ["--nproc-per-node", "some"],
        ["--nproc-per-node", "-1"],
        ["--max-restarts", "-1"],
        ["--device", "tpu"],
        ["--cluster", "join"],
        ["--cluster", "moon"],
        ["--cluster", "ray", "--code", "git"],
        ["--redirects", "7"],
        ["--tee", "0:9"],
        ["--tag", "team"],
        ["--env", "1A=2"],
        ["--env", "NOT_SET_ANYWHERE_P"],
        ["--env", "RANK=0"],
        ["--env", "PERDURE_STORE=x"],
        ["--env-file", "/nowhere"],
        ["--save-every", "0"],
        ["--store", "s3://key:secret@bucket/x"],
        ["-m", "--no-python"],
        ["--name", "Not An Id"],
        ["--node-rank", "1"],
        ["--role", "trainer"],
        ["--event-log-handler", "mine"],
        ["--local-ranks-filter", "0"],
        ["--duplicate-stdout-filters", "a"],
        ["--logs-specs", "mine"],
        ["--numa-binding", "node"],
        ["--signals-to-handle", "SIGTERM,SIGUSR1"],
        ["--virtual-local-rank"],
        ["--precheck", "off"],
        ["--output", "out"],
        ["--from", "other"],
    ],
    ids=" ".join,
)
def test_refused_in_words(words: list[str]) -> None:
    what = str(refused(*words))
    assert any(word.lstrip("-") in what for word in words), what


def test_credentials_in_a_url_are_not_repeated() -> None:
    assert "secret" not in str(refused("--store", "s3://key:secret@bucket/x"))


@pytest.mark.parametrize(
    "words",
    [
        ["--standalone"],
        ["--rdzv-backend", "c10d"],
        ["--rdzv-endpoint", "localhost:0"],
        ["--rdzv-id", "7"],
        ["--rdzv_conf", "timeout=3"],
        ["--monitor-interval", "1"],
        ["--start-method", "fork"],
        ["--run-path"],
        ["--master-addr", "127.0.0.1"],
        ["--master-port", "29500"],
        ["--local-addr", "localhost"],
    ],
    ids=" ".join,
)
def test_accepted_with_a_note(words: list[str]) -> None:
    (note,) = planned(*words, "train.py").notes
    assert words[0].replace("_", "-") in note


@pytest.mark.parametrize(
    "words",
    [
        ["--node-rank", "0"],
        ["--role", "default"],
        ["--nnodes", "1:1"],
        ["--signals-to-handle", "SIGTERM"],
    ],
)
def test_torchrun_s_own_defaults_are_no_news(words: list[str]) -> None:
    assert planned(*words, "train.py").notes == ()


def test_defaults() -> None:
    spec = planned("src/train_gpt.py", "--lr", "1").spec
    assert spec.run.startswith("train_gpt-1114-")
    assert spec.argv == ("src/train_gpt.py", "--lr", "1")
    assert spec.store == f"file:///home/u/.local/state/perdure/store/{spec.run}".replace(
        "/home/u", os.path.expanduser("~")
    )
    assert (spec.nnodes, spec.nproc_per_node, spec.max_restarts) == (1, 1, None)
    assert (spec.redirects, spec.tee, spec.code, spec.warm) == ("0", "0", "none", True)


def test_two_runs_of_one_second_differ() -> None:
    assert len({settings.run_id("a/train.py", 0.0) for _ in range(200)}) == 200
    assert settings.run_id("pkg.sub.main", 0.0).startswith("main-")
    assert settings.run_id("./Ünï.py", 0.0)[0].isascii()


def test_store_is_the_run_s_own_folder() -> None:
    spec = planned("--store", "s3://b/runs/", "--name", "mine", "t.py").spec
    assert (spec.run, spec.store) == ("mine", "s3://b/runs/mine")
    assert settings.run_folder("runs", "x", "/data") == "file:///data/runs/x"


def test_secrets_leave_beside_the_spec(tmp_path: Path) -> None:
    file = tmp_path / "secrets.env"
    file.write_text("# tokens\nexport HUB='abc def'\n\nW=1\n")
    environ = {"TOKEN": "hush-hush", "HOME": "/home/u"}
    given = said("--env", "A=1", "--env", "TOKEN", "--env", "W=2", "--env-file", str(file), "t.py")
    made = plan(given, environ, "/work", 0.0)
    assert made.secrets == {"TOKEN": "hush-hush", "HUB": "abc def", "W": "2"}
    assert made.spec.env == {"A": "1"}
    assert made.spec.secret_env == ("HUB", "TOKEN", "W")
    for shown in (made.spec.to_json(), repr(made)):
        assert "hush-hush" not in shown
        assert "abc def" not in shown


def test_a_bad_line_of_an_env_file_is_named_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "x.env"
    file.write_text("A=1\nthis-is-a-secret\n")
    what = str(refused("--env-file", str(file)))
    assert "line 2" in what
    assert "this-is-a-secret" not in what


def test_stop_grace_comes_from_torchrun_s_option() -> None:
    assert planned("--shutdown-timeout", "5", "t.py").spec.timers.stop_grace_s == 5.0


def test_a_cluster_takes_sizes_and_code() -> None:
    made = planned("--cluster", "10.0.0.1:6379", "--nnodes", "2", "--spares", "1", "t.py")
    assert (made.cluster, made.spec.nnodes, made.spec.spares) == ("10.0.0.1:6379", 2, 1)
    assert made.spec.code == "package"
    assert "auto counts this machine" in str(
        refused("--cluster", "ray", "--nproc-per-node", "auto")
    )


def test_ranks_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", lambda path: ["nvidia0", "nvidia1", "nvidiactl", "tty"])
    assert planned("--nproc-per-node", "gpu", "t.py").spec.nproc_per_node == 2
    assert planned("--nproc-per-node", "auto", "t.py").spec.device == "cuda"
    assert settings.count_devices("cuda", {"CUDA_VISIBLE_DEVICES": "1"}) == 1
    assert "no such device" in str(refused("--nproc-per-node", "npu"))


def resumed(old: Plan, *words: str, **environ: str) -> Plan:
    given = read(COMMANDS["resume"], ["R", *words], {})
    return settings.plan_resume(given, old.spec, old.spec.store, "local", environ, "/elsewhere")


def test_a_resume_changes_only_what_is_said() -> None:
    old = planned("--nproc-per-node", "4", "--env", "A=1", "--save-every", "9", "train.py", "-x")
    assert resumed(old).spec == old.spec
    new = resumed(old, "--nproc-per-node", "2", "--env", "B=2").spec
    assert (new.nproc_per_node, new.env, new.argv) == (2, {"A": "1", "B": "2"}, ("train.py", "-x"))
    assert (new.run, new.store, new.cwd) == (old.spec.run, old.spec.store, old.spec.cwd)


def test_a_resume_asks_for_secrets_by_name() -> None:
    given = said("--env", "TOKEN", "train.py")
    old = plan(given, {"TOKEN": "v1"}, "/work", 0.0)
    with pytest.raises(UsageError, match="secret TOKEN, and it is not set here"):
        resumed(old)
    assert resumed(old, TOKEN="v2").secrets == {"TOKEN": "v2"}
    assert resumed(old, "--env", "TOKEN=v3").secrets == {"TOKEN": "v3"}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_help_has_an_example(name: str) -> None:
    text = parser(COMMANDS[name]).format_help()
    assert f"example:\n  perdure {name}" in text
    assert "_per_" not in text, "one spelling in the help is enough"
    assert max(map(len, text.splitlines())) <= 100
