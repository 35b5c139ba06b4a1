"""run, submit, resume: from judged options to a job, in the order that costs the least time.

A local run starts its agent before anything is checked, because the agent's import of torch is the
longest part of a start; the checks run meanwhile, and a refusal ends the agent again. Nothing is
written to the store before every check has passed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from perdure.launchers import settings
from perdure.launchers.options import Given
from perdure.launchers.settings import Plan
from perdure.runtime.errors import UsageError

if TYPE_CHECKING:
    from perdure.checkpoint.store import Store
    from perdure.launchers.cluster_local import EarlyAgent
    from perdure.runtime.opening import ResumeFrom


def run(given: Given) -> int:
    plan = settings.plan(given, os.environ, os.getcwd(), time.time())
    if plan.dry_run:
        return _show(plan)
    early = _early(plan)
    try:
        for note in plan.notes:
            say(note)
        store = _checked(plan)
        plan = _with_code(plan, store)
    except BaseException:
        if early is not None:
            early.close()
        raise
    return _foreground(plan, early, None)


def submit(given: Given) -> int:
    plan = settings.plan(given, os.environ, os.getcwd(), time.time())
    if plan.dry_run:
        return _show(plan)
    for note in plan.notes:
        say(note)
    plan = _with_code(plan, _checked(plan))
    _submit(plan, None)
    _print_run(plan)
    return 0


def resume(given: Given) -> int:
    from perdure.launchers import runs
    from perdure.runtime.opening import ResumeFrom

    found = runs.find(given.target)
    store = runs.open_run(found)
    if not given.flag("takeover"):
        runs.refuse_alive(found)
    where = "local" if found.record is None or found.record.cluster == "local" else "ray"
    if found.record is not None and found.record.cluster == "ray" and found.record.address:
        where = found.record.address
    old = runs.read_spec(store)
    plan = settings.plan_resume(given, old, found.url, where, os.environ, os.getcwd())
    if plan.dry_run:
        return _show(plan)
    for note in plan.notes:
        say(note)
    if plan.cluster == "local":
        _check_here(plan)
    elif where == "local" and os.path.isdir(plan.spec.cwd):
        # it ran where its code lies; now it goes where it does not
        plan = _with_code(replace(plan, spec=replace(plan.spec, code="package")), store)
    back = ResumeFrom(
        step=settings.step_wanted(given), takeover=given.flag("takeover"), on_wait=say
    )
    return _foreground(plan, None, back)


def say(text: str) -> None:
    print(f"perdure: {text}", file=sys.stderr, flush=True)


def _early(plan: Plan) -> EarlyAgent | None:
    script = os.path.join(plan.spec.cwd, plan.spec.argv[0])
    if plan.cluster != "local" or (plan.spec.entry == "script" and not os.path.isfile(script)):
        return None  # the second will be refused: nothing needs to start for that
    from perdure.launchers.cluster_local import early_start

    return early_start(run=plan.spec.run, slots=plan.spec.nproc_per_node, warm=plan.spec.warm)


def _checked(plan: Plan) -> Store:
    """Every check that needs no rank. The order is that of the likeliest mistake."""
    from perdure.launchers import preflight

    preflight.check_entry(plan.spec, here=plan.cluster == "local")
    preflight.check_sharing(plan.spec, plan.cluster)
    store = preflight.open_probed(plan.spec)
    preflight.check_new(store, plan.spec.run)
    return store


def _check_here(plan: Plan) -> None:
    if not os.path.isdir(plan.spec.cwd):
        raise UsageError(
            f"the run's working folder {plan.spec.cwd} is not on this machine",
            hint="resume it where it was started, or on a cluster, to which its code is sent",
        )
    from perdure.launchers.preflight import check_entry

    check_entry(plan.spec, here=True)


def _with_code(plan: Plan, store: Store) -> Plan:
    """The working folder, packed and put, where ranks run on other machines."""
    if plan.spec.code == "none":
        return plan
    from perdure.checkpoint.errors import CheckpointError, KeyExists
    from perdure.launchers.codepack import pack
    from perdure.launchers.preflight import check_inside
    from perdure.runtime.errors import StoreProblem

    check_inside(plan.spec)
    package = pack(plan.spec.cwd)
    for note in package.notes:
        say(note)
    try:
        store.put(package.key, package.data, create=True)
    except KeyExists:
        say("the code is in the store already")
    except CheckpointError as error:
        raise StoreProblem(f"the code was not stored: {error}", hint=error.hint) from error
    return replace(plan, spec=replace(plan.spec, code_sha256=package.sha256))


def _foreground(plan: Plan, early: EarlyAgent | None, back: ResumeFrom | None) -> int:
    if plan.cluster != "local":
        _submit(plan, back)
        say(f"run {plan.spec.run}; what its ranks print: perdure logs {plan.spec.run} -f")
        return _watch(plan)
    from perdure.launchers.display import Display, face_for
    from perdure.launchers.job import run_local

    display = Display(face_for(as_json=plan.json))
    try:
        return run_local(plan.spec, plan.secrets, display, early=early, resume=back)
    finally:
        display.close()


def _submit(plan: Plan, back: ResumeFrom | None) -> None:
    if plan.cluster == "local":
        from perdure.launchers.job import submit as submit_local

        submit_local(plan.spec, plan.secrets, resume=back)
        return
    from perdure.launchers.ray_submit import submit_ray

    submit_ray(plan.spec, plan.secrets, plan.cluster, resume=back, say=say)


def _watch(plan: Plan) -> int:
    from perdure.launchers.commands_watch import watch

    return watch(plan.spec.run, as_json=plan.json)


def _show(plan: Plan) -> int:
    print(plan.spec.to_json())
    for note in plan.notes:
        say(note)
    return 0


def _print_run(plan: Plan) -> None:
    if plan.json:
        import json

        print(json.dumps({"run": plan.spec.run, "store": plan.spec.store}))
        return
    print(plan.spec.run)
    say(f"it goes on without this terminal; look with: perdure status {plan.spec.run}")


RUNNERS: dict[str, Callable[[Given], int]] = {"run": run, "submit": submit, "resume": resume}
