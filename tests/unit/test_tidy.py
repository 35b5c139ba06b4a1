"""Style is a test: what reviewers would otherwise have to say again and again.

The limits are those of CONTRIBUTING.md. Each check is a function from source text to complaints, so
that the checks themselves are tested on text that breaks them: a tidy test that finds nothing
because it looks at nothing would be worse than none.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("runtime", "launchers", "checkpoint", "health", "benchmarks")
EVERYWHERE = (*PACKAGE, "examples", "tests", ".src/perdure/__init__.py")

FILE_LINES, FUNCTION_LINES, CORE_LINES = 400, 60, 1500

# Pure: the same input gives the same output on every machine, for ever. Nothing that reads a clock,
# an environment, a file or a random number may be reached from these, directly or through another.
PURE = (
    "runtime/core/*.py",
    "runtime/causes.py",
    "runtime/jsonform.py",
    "runtime/spec.py",
    "runtime/errors.py",
    "checkpoint/errors.py",
    "checkpoint/assembly.py",
    "checkpoint/boxes.py",
    "checkpoint/codec.py",
    "checkpoint/keys.py",
    "checkpoint/leaves.py",
    "checkpoint/manifest.py",
    "checkpoint/plan.py",
)
PURE_IMPORTS = frozenset(
    {
        "__future__",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "heapq",
        "itertools",
        "math",
        "typing",
    }
)
# Formats are text and digests: still a function of their input.
FORMAT_IMPORTS = PURE_IMPORTS | {"hashlib", "json", "re", "struct"}

MARKER = re.compile(r"\b(TOD[O]|FIXM[E]|XX[X]|HAC[K])\b")  # brackets: not to find itself


def sources(*places: str) -> list[Path]:
    """Every Python file below the places, relative to the root; links are not followed twice."""
    found: set[Path] = set()
    for place in places:
        path = ROOT / place
        found.update(path.rglob("*.py") if path.is_dir() else [path])
    return sorted(file.relative_to(ROOT) for file in found)


def long_functions(text: str, limit: int = FUNCTION_LINES) -> list[str]:
    """Lines from `def` to the last statement: decorators and the docstring's length count too."""
    return [
        f"{node.name} has {length} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > limit
    ]


def imports(text: str) -> list[str]:
    """The modules a text imports, wherever in it, by their full names."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names.append("." * node.level)  # relative: perdure writes none
            elif node.module:
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def impure_imports(text: str, pure_modules: frozenset[str]) -> list[str]:
    """Imports that a pure module may not have."""

    def allowed(name: str) -> bool:
        if name.split(".")[0] in FORMAT_IMPORTS:
            return True
        # `from perdure.runtime.core import events` and `from ....events import Tick` are both right
        return name in pure_modules or name.rpartition(".")[0] in pure_modules

    return [name for name in imports(text) if not allowed(name)]


def uses_any(text: str) -> list[int]:
    """The lines on which typing.Any is named."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if (isinstance(node, ast.Name) and node.id == "Any")
        or (isinstance(node, ast.Attribute) and node.attr == "Any")
    ]


def unfinished(text: str) -> list[str]:
    """Leftover markers, and bodies that only pretend: `raise NotImplementedError`, bare `...`."""
    found = [
        f"line {n}: {m[0]}"
        for n, line in enumerate(text.splitlines(), 1)
        for m in MARKER.finditer(line)
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            call = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(call, ast.Name) and call.id == "NotImplementedError":
                found.append(f"line {node.lineno}: NotImplementedError")
    return found


def swallowed(text: str) -> list[str]:
    """`except:` and `except Exception` (or wider) whose whole body is `pass` or `...`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        wide = node.type is None or (
            isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
        )
        idle = all(
            isinstance(line, ast.Pass)
            or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            for line in node.body
        )
        if wide and idle:
            found.append(f"line {node.lineno}: an exception of any kind is swallowed")
    return found


def has_theory(text: str) -> bool:
    """A module opens with what it does and why; a file of one statement or none needs no theory."""
    tree = ast.parse(text)
    return len(tree.body) <= 1 or ast.get_docstring(tree) is not None


def sleeps(text: str) -> list[str]:
    """Calls of a function or method named sleep."""
    return [
        f"line {node.lineno}: sleep"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Attribute) and node.func.attr == "sleep")
            or (isinstance(node.func, ast.Name) and node.func.id == "sleep")
        )
    ]


def pure_files() -> list[Path]:
    return sorted(file.relative_to(ROOT) for glob in PURE for file in ROOT.glob(glob))


def module_name(file: Path) -> str:
    return ".".join(("perdure", *file.with_suffix("").parts)).removesuffix(".__init__")


def read(file: Path) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def test_files_and_functions_are_short() -> None:
    complaints = []
    for file in sources(*EVERYWHERE):
        text = read(file)
        if (lines := len(text.splitlines())) > FILE_LINES:
            complaints.append(f"{file} has {lines} lines")
        complaints += [f"{file}: {what}" for what in long_functions(text)]
    assert complaints == []


def test_the_core_stays_small() -> None:
    lines = sum(len(read(file).splitlines()) for file in sources("runtime/core"))
    assert 0 < lines < CORE_LINES


def test_pure_modules_import_only_pure_modules() -> None:
    files = pure_files()
    assert Path("runtime/core/events.py") in files, "the globs find nothing"
    pure = frozenset(module_name(file) for file in files)
    complaints = [f"{f}: imports {what}" for f in files for what in impure_imports(read(f), pure)]
    assert complaints == []


def test_the_core_has_no_any() -> None:
    assert [f"{f}:{n}" for f in sources("runtime/core") for n in uses_any(read(f))] == []


def test_nothing_is_left_unfinished_or_swallowed() -> None:
    complaints = [
        f"{file}: {what}"
        for file in sources(*EVERYWHERE)
        for what in (*unfinished(read(file)), *swallowed(read(file)))
    ]
    assert complaints == []


def test_modules_open_with_their_theory() -> None:
    assert [str(f) for f in sources(*PACKAGE, "examples") if not has_theory(read(f))] == []


def test_unit_tests_do_not_sleep() -> None:
    files = sources("tests/unit")
    assert [f"{f}: {what}" for f in files for what in sleeps(read(f))] == []


def test_the_package_is_imported_by_its_own_name() -> None:
    """`import runtime.x` works from the repository's root and makes a second copy of each class."""
    complaints = [
        f"{file}: imports {name}"
        for file in sources(*EVERYWHERE)
        for name in imports(read(file))
        if name.split(".")[0] in PACKAGE or name.startswith(".")
    ]
    assert complaints == []


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * 60, "def f():\n" + "    x = 1\n" * 59),
        (unfinished, f"x = 1  # TO{'DO'}: more", "x = 1  # the total"),
        (unfinished, "def f():\n    raise NotImplementedError('later')", "def f(): ..."),
        (swallowed, "try: f()\nexcept Exception: pass", "try: f()\nexcept KeyError: pass"),
        (swallowed, "try: f()\nexcept: ...", "try: f()\nexcept Exception: report()"),
        (sleeps, "import time\ntime.sleep(1)", "import time\ntime.monotonic()"),
        (sleeps, "from time import sleep\nsleep(1)", "clock.advance(1)"),
        (uses_any, "def f(x: Any) -> None: ...", "def f(x: object) -> None: ..."),
        (uses_any, "import typing\nx: typing.Any", "company = 1"),
    ],
)
def test_the_checks_bite(check, bad: str, good: str) -> None:  # type: ignore[no-untyped-def]
    assert check(bad)
    assert not check(good)


def test_impure_imports_bite() -> None:
    pure = frozenset(
        {"perdure.runtime.spec", "perdure.runtime.core", "perdure.runtime.core.events"}
    )
    for bad in (
        "import time",
        "import os.path",
        "from random import random",
        "from perdure.runtime.agent import Agent",
        "def f():\n    import socket",
        "from . import agent",
    ):
        assert impure_imports(bad, pure), bad
    for good in (
        "import dataclasses",
        "from collections.abc import Mapping",
        "from perdure.runtime.core import events",
        "from perdure.runtime.core.events import Event",
        "from perdure.runtime.spec import JobSpec",
    ):
        assert not impure_imports(good, pure), good


def test_a_module_without_theory_is_noticed() -> None:
    assert not has_theory("import os\nx = 1\n")
    assert has_theory('"""Why this file is here."""\nimport os\nx = 1\n')
