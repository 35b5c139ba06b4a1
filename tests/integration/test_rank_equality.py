"""A rank is equal to `python -u script.py`: each point compared with a plain process, warm and cold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROBE = '''
import atexit, gc, inspect, io, json, multiprocessing, os, pickle, random, signal, sys, threading
import warnings
import numpy, torch
import torch._dynamo  # as the first optimizer does; a rank has it from the start


class Local:
    """Pickled by reference to __main__."""


def helper():
    return os.getpid()


def describe():
    main = sys.modules["__main__"]
    stdin = sys.stdin.read()
    return {
        "name": __name__,
        "file": __file__,
        "spec": repr(__spec__ and __spec__.name),
        "package": __package__,
        "doc": __doc__,
        "loader": type(__loader__).__name__,
        "main names": sorted(name for name in vars(main) if name.startswith("__")),
        "argv": sys.argv,
        "orig_argv": sys.orig_argv[1:],
        "path": sys.path,
        "flags": list(sys.flags),
        "meta_path": [getattr(f, "__name__", type(f).__name__) for f in sys.meta_path],
        "cwd": os.getcwd(),
        "cmdline": open("/proc/self/cmdline").read().rstrip("\\0").split("\\0")[1:],
        "comm": open("/proc/self/comm").read(),
        "signals": {int(n): repr(signal.getsignal(n))[:18] for n in sorted(signal.valid_signals())},
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "wakeup": signal.set_wakeup_fd(-1),
        "threads": len(os.listdir("/proc/self/task")) <= 2,
        "main thread": threading.current_thread() is threading.main_thread(),
        "stdin": stdin,
        "stdout": [sys.stdout.encoding, sys.stdout.errors, sys.stdout.write_through],
        "stderr": [sys.stderr.encoding, sys.stderr.errors, sys.stderr.write_through],
        "excepthook": sys.excepthook is sys.__excepthook__,
        "breakpointhook": sys.breakpointhook is sys.__breakpointhook__,
        "gc": [gc.isenabled(), gc.get_threshold()],
        "recursion": sys.getrecursionlimit(),
        "warnings": [str(f[:3]) for f in warnings.filters],
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "cuda untouched": torch.cuda.is_initialized(),
        "group": os.getpgid(0) == os.getpid(),
        "nice": os.nice(0),
        "umask": os.umask(0o22),
        "pickled": type(pickle.loads(pickle.dumps(Local()))) is Local,
        "source": inspect.getsource(helper),
        "innermost": inspect.stack()[0].filename,
    }


def child(queue):
    queue.put([os.getppid(), __name__ in ("__main__", "__mp_main__"), Local.__name__])


def children():
    told = {}
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        told[method] = queue.get()[1:]
        process.join()
        told[method].append(process.exitcode)
    return told


if __name__ == "__main__":
    atexit.register(lambda: print("atexit ran"))
    told = describe()
    told["children"] = children()
    print(json.dumps(told))
'''


def plain(script: Path, *args: str, module: bool = False) -> subprocess.CompletedProcess[bytes]:
    what = ["-m", script.stem] if module else [str(script)]
    return subprocess.run(
        [sys.executable, "-u", *what, *args],
        check=False,
        cwd=script.parent,
        env=os.environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        start_new_session=True,
    )


class Ranks:
    """Runs scripts as ranks of one agent, a job each."""

    def __init__(self, nodes: Any, slots: int = 1) -> None:
        self.control = nodes.control(nodes.start(slots=slots))
        self.count = 0

    def run(self, script: Path, *args: str, **fields: Any) -> tuple[dict[str, Any], bytes, bytes]:
        """(report, stdout, stderr) of rank 0."""
        self.count += 1
        self.control.job(script, *args, **fields)
        started = self.control.started(self.count)
        assert (started["cold"] is None) is fields.get("warm", True)
        report = self.control.exits(self.control.agent.slots, within_s=60)[0]
        self.control.send("stop", attempt=f"1.{self.count}", grace_s=0)
        self.control.until("stopped")
        folder = Path(started["logs"]["0"])
        return report, (folder / "stdout.log").read_bytes(), (folder / "stderr.log").read_bytes()


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_script_finds_what_it_would_find_under_python(
    nodes: Any, tmp_path: Path, warm: bool
) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    expected = plain(script, "--lr", "1e-3")
    assert expected.returncode == 0, expected.stderr
    report, out, err = Ranks(nodes).run(script, "--lr", "1e-3", warm=warm)
    assert report["exit_code"] == 0, err
    want, got = (json.loads(text.splitlines()[0]) for text in (expected.stdout, out))
    assert {k: (want[k], got[k]) for k in want if want[k] != got[k]} == {}
    assert out.splitlines()[1] == b"atexit ran"


def test_a_module_finds_what_it_would_find_under_python(nodes: Any, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    expected = plain(tmp_path / "probe.py", "7", module=True)
    assert expected.returncode == 0, expected.stderr
    ranks = Ranks(nodes)
    report, out, err = ranks.run(tmp_path / "probe.py", entry="module", argv=("probe", "7"))
    assert report["exit_code"] == 0, err
    want, got = (json.loads(text.splitlines()[0]) for text in (expected.stdout, out))
    assert {k: (want[k], got[k]) for k in want if want[k] != got[k]} == {}


ENDS = {
    "error": "def f():\n    raise ValueError('x')\nf()\n",
    "chained": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('y') from e\n",
    "syntax": "x = (1,\n",
    "exit code": "import sys; sys.exit(7)\n",
    "exit text": "raise SystemExit('no data')\n",
    "interrupt": "raise KeyboardInterrupt\n",
    "own hook": "import sys\nsys.excepthook = lambda *a: print('mine', a[0].__name__)\n1 / 0\n",
    "thread": "import threading\nthreading.Thread(target=lambda: 1 / 0).start()\n",
    "abort": "import os; os.abort()\n",
    "killed by itself": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n",
    "no newline": "import sys; sys.stdout.write('text'); sys.stderr.write('more')",
}


def test_scripts_end_as_they_would_under_python(nodes: Any, tmp_path: Path) -> None:
    ranks = Ranks(nodes)
    for name, text in ENDS.items():
        script = tmp_path / "ends.py"
        script.write_text(text)
        expected = plain(script)
        report, out, err = ranks.run(script, env={"CASE": name.replace(" ", "_")})
        code = report["exit_code"] if report["signal"] is None else -report["signal"]
        assert (name, code, out, err.decode()) == (
            name,
            expected.returncode,
            expected.stdout,
            expected.stderr.decode(),
        )


def test_what_a_fork_would_share_is_not_shared(nodes: Any, tmp_path: Path) -> None:
    script = tmp_path / "draw.py"
    script.write_text(
        "import random, numpy, torch, json\n"
        "print(json.dumps([random.random(), numpy.random.rand(), torch.rand(1).item()]))\n"
    )
    control = nodes.control(nodes.start(slots=2))
    control.job(script)
    logs = control.started(1)["logs"]
    control.exits(2)
    one, two = (json.loads((Path(logs[rank]) / "stdout.log").read_text()) for rank in "01")
    assert one[0] != two[0]
    assert one[1] != two[1]
    assert one[2] != two[2]


def test_a_rank_sees_torchrun_s_environment_and_no_secret_of_ours(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_ID", "7")
    script = tmp_path / "env.py"
    script.write_text("import os, json\nprint(json.dumps(dict(os.environ)))\n")
    control = nodes.control(nodes.start(slots=2))
    control.job(script, env={"LEVEL": "3"}, secrets={"KEY": "of the user"})
    started = control.started(3)
    control.exits(2)
    env = json.loads((Path(started["logs"]["1"]) / "stdout.log").read_text())
    expected = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": "1",
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_RUN_ID": "agent-test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "OMP_NUM_THREADS": "1",
        "PERDURE_ATTEMPT": "1.3",
        "PERDURE_NODE": "n0",
        "PERDURE_RESTORE": "",
        "LEVEL": "3",
        "KEY": "of the user",
    }
    assert {name: env.get(name) for name in expected} == expected
    assert env["TORCHELASTIC_ERROR_FILE"] == str(Path(started["logs"]["1"]) / "error.json")
    assert not [name for name in env if name.startswith("RAY_")]
    assert "tok" not in env.values()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import os\nos.environ['OMP_NUM_THREADS'] = '2'\nimport torch\n", "OMP_NUM_THREADS"),
        ("import os\nos.environ.setdefault('CUDA_VISIBLE_DEVICES', '')\n", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_script_that_sets_what_torch_reads_at_load_starts_cold(
    nodes: Any, tmp_path: Path, text: str, why: str
) -> None:
    script = tmp_path / "early.py"
    script.write_text(text + "import torch\nprint(torch.get_num_threads())\n")
    control = nodes.control(nodes.start(slots=1))
    control.job(script)
    assert why in control.started(1)["cold"]
    assert control.exits(1)[0]["exit_code"] == 0


def test_a_load_time_variable_of_the_job_is_in_force(nodes: Any, tmp_path: Path) -> None:
    script = tmp_path / "threads.py"
    script.write_text("import torch\nprint(torch.get_num_threads())\n")
    control = nodes.control(nodes.start(slots=2))
    control.job(script, env={"OMP_NUM_THREADS": "2"})
    started = control.started(1)
    assert started["cold"] is None, "another zygote was to be started with it"
    control.exits(2)
    assert (Path(started["logs"]["0"]) / "stdout.log").read_text() == "2\n"


def test_a_module_beside_the_script_that_shadows_one_of_torch_s(nodes: Any, tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("mine = True\n")
    (tmp_path / "decimal.py").write_text("from _decimal import *\nmine = True\n")
    script = tmp_path / "shadow.py"
    script.write_text("import decimal\nprint(getattr(decimal, 'mine', False))\n")
    control = nodes.control(nodes.start())
    control.job(script)
    started = control.started(1)
    control.exits(1)
    assert "shadows" in started["cold"]
    assert (Path(started["logs"]["0"]) / "stdout.log").read_text() == "True\n"


def test_a_command_runs_as_it_is(nodes: Any, tmp_path: Path) -> None:
    control = nodes.control(nodes.start())
    control.job(tmp_path / "x", entry="command", argv=("sh", "-c", "echo rank $RANK; exit 5"))
    started = control.started(1)
    assert "--no-python" in started["cold"]
    assert control.exits(1)[0]["exit_code"] == 5
    assert (Path(started["logs"]["0"]) / "stdout.log").read_text() == "rank 0\n"
    control.job(tmp_path / "x", entry="command", argv=("no-such-program",))
    control.launch(2)
    assert control.exits(1)[0]["exit_code"] == 127


def test_cold_ranks_count_their_steps_too(nodes: Any, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import time, torch\nlayer = torch.nn.Linear(2, 2)\n"
        "first = torch.optim.SGD(layer.parameters(), lr=0.1)\n"
        "second = torch.optim.SGD(layer.parameters(), lr=0.1)\n"
        "for step in range(30):\n    first.step(); second.step(); time.sleep(0.05)\n"
    )
    control = nodes.control(nodes.start())
    control.job(script, warm=False)
    control.started(1)
    beat = control.step(2, within_s=60)
    assert beat["ranks"]["0"]["phase"] == "train"
    assert beat["ranks"]["0"]["step"] < 30, "both optimizers were counted into one"
