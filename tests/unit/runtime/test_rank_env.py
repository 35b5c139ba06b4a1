"""Which environment a rank gets, and when a forked process cannot honour it."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.runtime import rank_env


def common(node_env: dict[str, str], *, nproc: int = 1, **spec: Any) -> dict[str, str]:
    return rank_env.common(
        node_env,
        {"env": {}, "run": "r", "store": "file:///s/r", "budget": {"restarts": 100}, **spec},
        {"PASSWORD": "hidden"},
        {
            "attempt": "2.7",
            "world_size": 4,
            "members": [["a", 0, 0, 2], ["b", 1, 2, 2]],
            "master_addr": "10.0.0.1",
            "master_port": 1234,
            "restore": {"step": 40, "attempt": "2.6"},
        },
        nproc=nproc,
        group_rank=1,
        uploader="/run/up.sock",
        agent_store=True,
    )


def test_ray_and_inner_variables_stay_behind_the_rest_and_the_marks_go_along() -> None:
    env = common({"RAY_X": "1", "PERDURE_SECRET": "2", "PERDURE_RUN": "r", "HOME": "/h"})
    assert "RAY_X" not in env
    assert "PERDURE_SECRET" not in env
    assert (env["PERDURE_RUN"], env["HOME"], env["PASSWORD"]) == ("r", "/h", "hidden")


def test_the_restart_count_is_global() -> None:
    env = common({})
    assert env["TORCHELASTIC_RESTART_COUNT"] == "6"
    assert env["PERDURE_ATTEMPT"] == "2.7"
    assert env["PERDURE_RESTORE"] == '{"step": 40, "attempt": "2.6"}'
    assert env["TORCHELASTIC_MAX_RESTARTS"] == "100"
    assert common({}, max_restarts=3)["TORCHELASTIC_MAX_RESTARTS"] == "3"


def test_threads_are_one_a_rank_unless_somebody_chose() -> None:
    assert "OMP_NUM_THREADS" not in common({})
    assert common({}, nproc=2)["OMP_NUM_THREADS"] == "1"
    assert common({"OMP_NUM_THREADS": "4"}, nproc=2)["OMP_NUM_THREADS"] == "4"
    assert common({}, nproc=2, env={"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_only_variables_that_are_read_at_load_matter_to_the_zygote() -> None:
    env = {"OMP_NUM_THREADS": "1", "TORCH_NCCL_DUMP": "1", "HOME": "/", "PYTHONPATH": "/x"}
    assert rank_env.load_time(env) == {"OMP_NUM_THREADS": "1", "PYTHONPATH": "/x"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import os\nos.environ['OMP_NUM_THREADS'] = '2'\nimport torch\n", "OMP_NUM_THREADS"),
        ("import os\nimport torch\nos.environ['OMP_NUM_THREADS'] = '2'\n", None),
        ("import os\nos.environ['WANDB_MODE'] = 'off'\nimport torch\n", None),
        ("import os\nos.environ.setdefault('MKL_NUM_THREADS', '2')\n", "MKL_NUM_THREADS"),
        ("from os import environ\nenviron['LD_LIBRARY_PATH'] += ':/x'\n", "LD_LIBRARY_PATH"),
        ("import os\nos.environ.update({'KMP_BLOCKTIME': '0'}, A='1')\n", "KMP_BLOCKTIME"),
        ("import os\nos.putenv('CUDA_VISIBLE_DEVICES', '0')\nfrom torch import nn\n",
         "CUDA_VISIBLE_DEVICES"),
        ("import os\nprint(os.environ['OMP_NUM_THREADS'])\nimport torch\n", None),
        ("this is no python", None),
    ],
)  # fmt: skip
def test_a_script_that_sets_them_too_early_for_a_fork_is_found(
    source: str, name: str | None
) -> None:
    assert rank_env.sets_early(source.encode()) == name
