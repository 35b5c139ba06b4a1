"""Which environment a rank gets, and whether a process forked from the zygote can honour it.

The rules are torchrun's, with our own variables added. Some variables are read when torch or libgomp
is loaded, which in a forked rank was long ago: those of `LOAD_TIME` must be equal in the zygote, or
another zygote is started with them. A script that sets one itself before its first import of torch
can only be honoured by a fresh process: `sets_early` finds that by reading the script.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from perdure.runtime.beatpage import BEAT_FD_VARIABLE, WAKE_FD_VARIABLE
from perdure.runtime.sweep import AGENT_MARK, NODE_MARK, RUN_MARK
from perdure.runtime.worker import BEAT_FD, WAKE_FD

LOAD_TIME = re.compile(
    r"^(OMP_|GOMP_|KMP_|MKL_|OPENBLAS_|BLIS_|GOTO_|NUMEXPR_|LD_|MALLOC_|GLIBC_|PYTHON|PYTORCH_|TORCH_)"
)
_NOT_LOAD_TIME = re.compile(r"^(TORCH_NCCL_|TORCH_FR_|TORCH_HOME|PYTHONUNBUFFERED)")
_EARLY = re.compile(r"^(CUDA_|ASCEND_|HIP_|ROCR_)")
_OURS = (RUN_MARK, NODE_MARK, AGENT_MARK)


def common(
    node_env: Mapping[str, str],
    spec: Mapping[str, Any],
    secrets: Mapping[str, str],
    launch: Mapping[str, Any],
    *,
    nproc: int,
    group_rank: int,
    uploader: str,
    agent_store: bool,
) -> dict[str, str]:
    """What all ranks of a node share."""
    env = {
        name: value
        for name, value in node_env.items()
        if name in _OURS or not name.startswith(("RAY_", "PERDURE_"))
    }
    if nproc > 1:
        env.setdefault("OMP_NUM_THREADS", "1")
    env.update(spec["env"])
    env.update(secrets)
    counter = int(launch["attempt"].partition(".")[2])
    restore = launch["restore"]
    every = spec.get("save_every_steps")
    env.update(
        LOCAL_WORLD_SIZE=str(nproc),
        WORLD_SIZE=str(launch["world_size"]),
        GROUP_RANK=str(group_rank),
        GROUP_WORLD_SIZE=str(len(launch["members"])),
        ROLE_NAME="default",
        ROLE_WORLD_SIZE=str(launch["world_size"]),
        MASTER_ADDR=launch["master_addr"],
        MASTER_PORT=str(launch["master_port"]),
        TORCHELASTIC_RESTART_COUNT=str(counter - 1),
        TORCHELASTIC_MAX_RESTARTS=str(spec["budget"]["restarts"]),
        TORCHELASTIC_RUN_ID=spec["run"],
        TORCHELASTIC_USE_AGENT_STORE=str(agent_store),
        PERDURE_ATTEMPT=launch["attempt"],
        PERDURE_STORE=spec["store"],
        PERDURE_RESTORE=json.dumps(restore) if restore else "",
        PERDURE_UPLOADER=uploader,
        PERDURE_SAVE_EVERY=str(every) if every else "",
    )
    env[BEAT_FD_VARIABLE] = str(BEAT_FD)
    env[WAKE_FD_VARIABLE] = str(WAKE_FD)
    if spec.get("max_restarts") is not None:
        env["TORCHELASTIC_MAX_RESTARTS"] = str(spec["max_restarts"])
    env.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    return env


def of_rank(rank: int, local_rank: int, error_file: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "ROLE_RANK": str(rank),
        "TORCHELASTIC_ERROR_FILE": error_file,
    }


def load_time(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in env.items()
        if LOAD_TIME.match(name) and not _NOT_LOAD_TIME.match(name)
    }


def sets_early(source: bytes) -> str | None:
    """The first variable that a script sets before it imports torch, of those that are read then."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None  # the rank will say it better
    imports = (ast.Import, ast.ImportFrom)
    first_torch = min(
        (n.lineno for n in ast.walk(tree) if isinstance(n, imports) and _imports_torch(n)),
        default=1 << 30,
    )
    found = [
        (node.lineno, name)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.Call, ast.AugAssign))
        for name in _sets(node)
        if node.lineno < first_torch
        and (_EARLY.match(name) or (LOAD_TIME.match(name) and not _NOT_LOAD_TIME.match(name)))
    ]
    return min(found)[1] if found else None


def script_sets_early(spec: Mapping[str, Any], cwd: str) -> str | None:
    if spec["entry"] != "script":
        return None
    try:
        with open(os.path.join(cwd, spec["argv"][0]), "rb") as file:
            return sets_early(file.read())
    except OSError:
        return None


def _imports_torch(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] == "torch" for alias in node.names)
    return (node.module or "").partition(".")[0] == "torch"


def _sets(node: ast.Assign | ast.AugAssign | ast.Call) -> list[str]:
    """Names of environment variables that this statement or call sets, as far as they are literal."""
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called.endswith(("environ.setdefault", "putenv")) and node.args:
            return _literal(node.args[0])
        if called.endswith("environ.update"):
            keys = [key.arg for key in node.keywords if key.arg]
            for argument in node.args:
                if isinstance(argument, ast.Dict):
                    keys += [name for key in argument.keys if key for name in _literal(key)]
            return keys
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [
        name
        for target in targets
        if isinstance(target, ast.Subscript) and ast.unparse(target.value).endswith("environ")
        for name in _literal(target.slice)
    ]


def _literal(node: ast.expr) -> list[str]:
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
