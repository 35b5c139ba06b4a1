"""From what was said to a JobSpec: every value judged, defaults filled in, nothing started.

A launch is planned first and acted on later, so that `--dry-run` prints exactly what would run. This
module reads the environment and the list of devices once; the spec it makes never does again.
Secrets (`--env K`, `--env-file`) leave here beside the spec, never in it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast, get_args
from urllib.parse import urlsplit

from perdure.launchers.options import Given
from perdure.launchers.records import home
from perdure.launchers.torchrun_options import judge
from perdure.runtime.errors import UsageError
from perdure.runtime.spec import Device, Entry, JobSpec, Timers

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STD = re.compile(r"([0-3]|\d+:[0-3](,\d+:[0-3])*)")
_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"  # none that is read as another


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A launch, decided and not begun."""

    spec: JobSpec
    cluster: str  # "local", "ray", or an address of a Ray cluster
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()  # said once, before anything starts
    json: bool = False
    dry_run: bool = False
    named: bool = False  # the user chose the run id: it may exist already


def run_id(target: str, now_s: float) -> str:
    """`train-1124-093000-k3xq`: says what and when, and is new even twice in one second."""
    stem = os.path.basename(target.rstrip("/")).rsplit(".py", 1)[0].rsplit(".", 1)[-1]
    stem = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:40] or "job"
    when = time.strftime("%m%d-%H%M%S", time.localtime(now_s))
    return f"{stem}-{when}-{''.join(_LETTERS[byte % len(_LETTERS)] for byte in os.urandom(4))}"


def plan(given: Given, environ: Mapping[str, str], cwd: str, now_s: float) -> Plan:
    """Raises UsageError with the option's name for each value that cannot be."""
    if given.target is None:
        raise UsageError(
            "no script was given",
            hint=f"name it last: perdure {given.command.name} {given.command.usage}",
        )
    notes = judge(given)
    run = given.text("name") or run_id(given.target, now_s)
    cluster = _cluster(given)
    device = _device(given)
    values, secret = _environment(given, environ)
    spec = JobSpec(
        run=run,
        entry=_entry(given),
        argv=(given.target, *given.args),
        cwd=cwd,
        store=run_folder(given.text("store") or os.path.join(home(environ), "store"), run, cwd),
        nnodes=_nodes(given, cluster),
        nproc_per_node=_ranks(given, cluster),
        device=device,
        spares=_whole(given, "spares", 0, least=0),
        max_restarts=_maybe(given, "max_restarts", least=0),
        save_every_steps=_maybe(given, "save_every", least=1),
        code="none" if cluster == "local" else _code(given),
        env=values,
        secret_env=tuple(sorted(secret)),
        warm=not given.flag("no_warm"),
        log_dir=os.path.join(cwd, given.text("log_dir") or os.path.join(home(environ), "logs")),
        redirects=_redirects(given),
        tee=_std(given, "tee"),
        tags=_tags(given),
        timers=_timers(given),
    )
    _refuse_spares(spec, cluster)
    return Plan(
        spec=spec,
        cluster=cluster,
        secrets=secret,
        notes=tuple(notes),
        json=given.flag("json"),
        dry_run=given.flag("dry_run"),
        named=given.text("name") is not None,
    )


def plan_resume(
    given: Given, old: JobSpec, url: str, cluster: str, environ: Mapping[str, str], cwd: str
) -> Plan:
    """The old spec with what was said now on top. Secrets are asked for by name."""
    notes = judge(given)
    cluster = _cluster(given) if given.text("cluster") else cluster
    values, secret = _environment(given, environ)
    for name in old.secret_env:
        if name in values:  # once a secret, always one, however it is passed now
            secret[name] = values.pop(name)
        if name in secret:
            continue
        if name not in environ:
            raise UsageError(
                f"the run was started with the secret {name}, and it is not set here",
                hint=f"set {name} in this environment, or pass --env {name}=... or --env-file",
            )
        secret[name] = environ[name]
    plain = {k: v for k, v in {**old.env, **values}.items() if k not in secret}
    said = given.values
    spec = replace(
        old,
        store=url,
        nnodes=_nodes(given, cluster) if "nnodes" in said else old.nnodes,
        nproc_per_node=_ranks(given, cluster) if "nproc_per_node" in said else old.nproc_per_node,
        device=_device(given) if "device" in said else old.device,
        spares=_whole(given, "spares", old.spares, least=0),
        max_restarts=_maybe(given, "max_restarts", least=0)
        if "max_restarts" in said
        else old.max_restarts,
        save_every_steps=_maybe(given, "save_every", least=1)
        if "save_every" in said
        else old.save_every_steps,
        env=plain,
        secret_env=tuple(sorted(secret)),
        warm=old.warm and not given.flag("no_warm"),
        log_dir=os.path.join(cwd, given.text("log_dir") or old.log_dir or ""),
        redirects=_std(given, "redirects") if "redirects" in said else old.redirects,
        tee=_std(given, "tee") if "tee" in said else old.tee,
        tags={**old.tags, **_tags(given)},
        timers=_timers(given) if "shutdown_timeout" in said else old.timers,
    )
    _refuse_spares(spec, cluster)
    return Plan(
        spec=spec,
        cluster=cluster,
        secrets=secret,
        notes=tuple(notes),
        json=given.flag("json"),
        dry_run=given.flag("dry_run"),
    )


def run_folder(base: str, run: str, cwd: str) -> str:
    """`<store>/<run>` as a URL. A folder without a scheme is one on this machine."""
    parts = urlsplit(base)
    if parts.scheme and "://" in base:
        if parts.username or parts.password:
            raise UsageError(
                f"--store {parts.scheme}://...@{parts.hostname}: credentials do not belong in a URL",
                hint="put them in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        return f"{base.rstrip('/')}/{run}"
    return f"file://{os.path.abspath(os.path.join(cwd, os.path.expanduser(base)))}/{run}"


def count_devices(kind: str, environ: Mapping[str, str] = os.environ) -> int:
    """Devices that this process may use, by the files of their drivers: torch is not asked."""
    if kind == "cpu":
        return len(os.sched_getaffinity(0))
    pattern, visible = {
        "cuda": (r"nvidia\d+", "CUDA_VISIBLE_DEVICES"),
        "npu": (r"davinci\d+", "ASCEND_RT_VISIBLE_DEVICES"),
    }[kind]
    there = sum(bool(re.fullmatch(pattern, name)) for name in os.listdir("/dev"))
    if there and (text := environ.get(visible)) is not None:
        return min(there, len([part for part in text.split(",") if part.strip()]))
    return there


def _device(given: Given) -> Device:
    kind = given.text("device") or "auto"
    if kind == "auto":
        return "cuda" if count_devices("cuda") else "npu" if count_devices("npu") else "cpu"
    if kind not in get_args(Device):
        raise UsageError(
            f"{given.spelled('device')} {kind!r} is not known", hint="auto, cuda, npu or cpu"
        )
    return cast(Device, kind)


def _entry(given: Given) -> Entry:
    if given.flag("module") and given.flag("no_python"):
        raise UsageError(
            "--module and --no-python exclude each other", hint="leave one of them out"
        )
    return "module" if given.flag("module") else "command" if given.flag("no_python") else "script"


def _cluster(given: Given) -> str:
    where = given.text("cluster") or "local"
    if where == "join":
        raise UsageError(
            f"{given.spelled('cluster')} join is not built yet",
            hint="use --cluster ray, or run on one machine",
        )
    if where not in {"local", "ray", "auto"} and ":" not in where:
        raise UsageError(
            f"{given.spelled('cluster')} {where!r} is neither a kind nor an address",
            hint="local, ray, or HOST:PORT of a Ray cluster's head",
        )
    return "ray" if where == "auto" else where


def _nodes(given: Given, cluster: str) -> int:
    text = given.text("nnodes") or "1"
    low, colon, high = text.partition(":")
    if colon and low != high:
        raise UsageError(
            f"{given.spelled('nnodes')} {text}: elastic sizes are not built yet",
            hint=f"give one number, such as --nnodes {high}",
        )
    nodes = _number(given, "nnodes", low, least=1)
    if nodes > 1 and cluster == "local":
        raise UsageError(
            f"{given.spelled('nnodes')} {nodes}: a local run has this machine only",
            hint="add --cluster ray (or HOST:PORT of its head), or leave --nnodes out",
        )
    return nodes


def _ranks(given: Given, cluster: str) -> int:
    text = given.text("nproc_per_node") or "1"
    kinds = {"auto": _device(given), "gpu": "cuda", "cuda": "cuda", "npu": "npu", "cpu": "cpu"}
    if text not in kinds:
        return _number(given, "nproc_per_node", text, least=1)
    if cluster != "local":
        raise UsageError(
            f"{given.spelled('nproc_per_node')} {text} counts this machine, and the job runs on "
            "others",
            hint="give the number of ranks a node",
        )
    count = count_devices(kinds[text])
    if not count:
        raise UsageError(
            f"{given.spelled('nproc_per_node')} {text}: this machine has no such device",
            hint="check the driver (nvidia-smi, npu-smi), or use --nproc-per-node cpu",
        )
    return count


def _refuse_spares(spec: JobSpec, cluster: str) -> None:
    if spec.spares and cluster == "local":
        raise UsageError(
            f"--spares {spec.spares}: a local run has this machine only",
            hint="leave it out, or add --cluster ray",
        )


def _number(given: Given, dest: str, text: str, *, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise UsageError(
            f"{given.spelled(dest)} {text!r} is not a whole number", hint="give a number"
        ) from None
    if value < least:
        raise UsageError(
            f"{given.spelled(dest)} {value} is too small", hint=f"it must be at least {least}"
        )
    return value


def _whole(given: Given, dest: str, default: int, *, least: int) -> int:
    text = given.text(dest)
    return default if text is None else _number(given, dest, text, least=least)


def _maybe(given: Given, dest: str, *, least: int) -> int | None:
    text = given.text(dest)
    return None if text is None else _number(given, dest, text, least=least)


def step_wanted(given: Given) -> int | None:
    return _maybe(given, "step", least=0)


def _code(given: Given) -> Literal["package", "none"]:
    how = given.text("code") or "package"
    if how in {"package", "none"}:
        return cast(Literal["package", "none"], how)
    raise UsageError(f"{given.spelled('code')} {how!r} is not known", hint="package or none")


def _std(given: Given, dest: str) -> str:
    text = given.text(dest) or "0"
    if not _STD.fullmatch(text):
        raise UsageError(
            f"{given.spelled(dest)} {text!r} is not understood",
            hint="0 none, 1 stdout, 2 stderr, 3 both; or LOCAL_RANK:N,... as in 0:3,1:2",
        )
    return text


def _redirects(given: Given) -> str:
    """With --json stdout is for objects: the ranks' output goes to their files unless asked for."""
    return (
        "3" if given.flag("json") and "redirects" not in given.values else _std(given, "redirects")
    )


def _timers(given: Given) -> Timers:
    grace_s = _maybe(given, "shutdown_timeout", least=0)
    return Timers() if grace_s is None else Timers(stop_grace_s=float(grace_s))


def _tags(given: Given) -> dict[str, str]:
    pairs = [text.partition("=") for text in given.texts("tag")]
    if wrong := [key for key, equals, _ in pairs if not equals or not key]:
        raise UsageError(f"--tag {wrong[0]!r} has no value", hint="write it as --tag KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _environment(given: Given, environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(plain, secret). What is named last wins; a secret never becomes plain by being named twice."""
    plain: dict[str, str] = {}
    secret: dict[str, str] = {}
    for path in given.texts("env_file"):
        secret.update(_env_file(path))
    for text in given.texts("env"):
        key, equals, value = text.partition("=")
        if not _NAME.fullmatch(key):
            raise UsageError(f"--env {key!r} is not a variable's name", hint="--env NAME[=VALUE]")
        if equals:
            (secret if key in secret else plain)[key] = value
        elif key in environ:
            plain.pop(key, None)
            secret[key] = environ[key]
        else:
            raise UsageError(
                f"--env {key}: it is not set here, so it has no value to pass on",
                hint=f"set it, or write --env {key}=VALUE",
            )
    for name in {*plain, *secret}:
        if name.startswith(("PERDURE_", "TORCHELASTIC_")) or name in {"RANK", "WORLD_SIZE"}:
            raise UsageError(
                f"--env {name}: perdure sets this one for each rank", hint="leave it out"
            )
    return plain, secret


def _env_file(path: str) -> dict[str, str]:
    """K=V lines; `#` comments and `export` are passed over, one pair of quotes is taken off."""
    found: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--env-file {path} cannot be read: {getattr(error, 'strerror', None) or error}",
            hint="name a text file of K=V lines",
        ) from error
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("export ")
        if not text or text.startswith("#"):
            continue
        key, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(key.strip()):
            # the line itself is not shown: it may hold a secret
            raise UsageError(f"--env-file {path}, line {number} is not K=V", hint="correct it")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[key.strip()] = value
    return found
