"""One controller after another: adoption, recoveries that are finished, who is alive and who is not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from perdure.runtime import journal
from perdure.runtime.errors import RunProblem
from perdure.runtime.opening import ResumeFrom, prepare, refuse_if_alive

Script = Iterator[Callable[[Any, Any], bool]]


def test_a_new_controller_adopts_and_takes_the_secrets_from_the_agents(
    make_world: Any, until: Any
) -> None:
    world = make_world(nnodes=2)
    world.spec = replace(world.spec, secret_env=("KEY",))
    world.secrets = {"KEY": "s3cr3t"}

    class Killed(Exception):
        pass

    def die(status: Any, lines: Any) -> None:
        if status["phase"] == "running" and world.driver._journal.clean:
            raise Killed

    with pytest.raises(Killed):
        world.make(die).run()
    for agent in world.agents:
        agent.heard.clear()
    world.secrets = {}

    def script() -> Script:
        yield lambda status, lines: "took_over" in world.kinds()
        for agent in world.agents:
            agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert world.driver.spec.secret_env == ("KEY",)
    for agent in world.agents:
        assert agent.secrets == {"KEY": "s3cr3t"}
        assert "launch" not in agent.kinds() and "stop" not in agent.kinds()
    assert "took_over" in world.kinds()


def test_a_controller_that_died_before_its_first_words_is_followed_all_the_same(
    make_world: Any, until: Any
) -> None:
    world = make_world()
    (agent,) = world.agents

    class Killed(Exception):
        pass

    def die(status: Any, lines: Any) -> None:
        if status["phase"] == "running":
            raise Killed

    with pytest.raises(Killed):
        world.make(die).run()
    assert journal.read(world.store).state is None, "the case that is meant"
    agent.heard.clear()

    def script() -> Script:
        yield lambda status, lines: "took_over" in world.kinds()
        agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert "launch" not in agent.kinds() and "stop" not in agent.kinds()


@pytest.mark.parametrize("then", ["they go on", "one ends"])
def test_damaged_checkpoints_do_not_end_a_gang_that_trains_and_never_start_one_from_nothing(
    make_world: Any, then: str
) -> None:
    world = make_world()
    (agent,) = world.agents

    class Killed(Exception):
        pass

    def die(status: Any, lines: Any) -> None:
        if status["phase"] == "running" and status["checkpoint"] is None:
            agent.say(kind="committed", attempt=agent.attempt, step=4, tier="store")
        elif status["checkpoint"] and world.driver._journal.clean:
            raise Killed

    with pytest.raises(Killed):
        world.make(die).run()
    world.store.put(f"checkpoints/commits/000000000004-{agent.attempt}.json", b'{"cut sho')
    agent.heard.clear()

    def script() -> Script:
        yield lambda status, lines: "took_over" in world.kinds()
        if then == "they go on":
            agent.all_exit(exit_code=0)
        else:
            agent.exited(0, signal=9)

    assert world.run(script()) == (0 if then == "they go on" else 2)
    assert "launch" not in agent.kinds()
    assert any("can be restored" in line.get("text", "") for line in world.lines)


def test_a_snapshot_from_before_the_launch_does_not_hide_the_gang(
    make_world: Any, until: Any
) -> None:
    world = make_world()
    (agent,) = world.agents
    agent.deaf.add("job")

    class Killed(Exception):
        pass

    def die(status: Any, lines: Any) -> None:
        if status["phase"] == "waiting" and journal.read(world.store).state is not None:
            raise Killed

    with pytest.raises(Killed):
        world.make(die).run()
    agent.deaf.clear()
    agent.heard.clear()
    agent.attempt, agent.running = "1.1", True  # launched right after that snapshot
    agent.launch = {"members": [["n0", 0, 0, 2]], "restore": None}

    def script() -> Script:
        yield until("running")
        agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert "launch" not in agent.kinds() and "stop" not in agent.kinds()


def test_a_controller_that_died_in_a_recovery_is_followed_by_one_that_finishes_it(
    make_world: Any, until: Any
) -> None:
    world = make_world(nnodes=2)
    _, second = world.agents

    class Killed(Exception):
        pass

    def die(status: Any, lines: Any) -> None:
        if status["phase"] == "running":
            if world.driver._journal.clean:
                second.exited(2, signal=9)
                second.deaf.add("stop")
        elif status["phase"] == "stopping":
            second.running = False
            raise Killed

    with pytest.raises(Killed):
        world.make(die).run()
    second.deaf.clear()

    def script() -> Script:
        yield lambda status, lines: status["phase"] == "running" and status["attempt"] == "2.2"
        for agent in world.agents:
            agent.all_exit(exit_code=0)

    assert world.run(script()) == 0


def test_who_is_superseded_stops_acting(make_world: Any, until: Any) -> None:
    world = make_world()
    (agent,) = world.agents

    def script() -> Script:
        yield until("running")
        agent.term = 9
        agent.beat(1)  # its ack is refused

    with pytest.raises(RunProblem, match="taken this run over"):
        world.run(script())
    assert agent.running, "its ranks belong to the other controller now"
    assert world.cluster.closed == 0


def test_a_resume_goes_on_counting_and_restores_nothing_that_is_not_there(
    make_world: Any, until: Any
) -> None:
    world = make_world()

    def script() -> Script:
        yield until("running")
        world.agents[0].all_exit(exit_code=3)

    world.spec = replace(world.spec, max_restarts=0)
    assert world.run(script()) == 3
    opening = prepare(world.store, resume=ResumeFrom())
    assert (opening.term, opening.counter, opening.state) == (2, 1, None)


def test_alive_is_who_moves(make_world: Any) -> None:
    store = make_world().store
    now = [1000.0]
    told: list[str] = []

    def write(number: int) -> None:
        line = {"kind": "note", "at": now[0], "text": ""}
        store.put(journal.segment_key(1, number), journal.seal([line]))

    def judge(sleep: Callable[[float], None], known_dead: bool = False) -> None:
        refuse_if_alive(
            store,
            known_dead=known_dead,
            on_wait=told.append,
            now_s=lambda: now[0],
            sleep=sleep,
        )

    def later(seconds: float) -> None:
        now[0] += seconds

    judge(later)  # no journal: nothing ever lived
    write(1)
    judge(later, known_dead=True)
    assert not told
    judge(later)  # does not move: dead after 30 s
    assert 1029 <= now[0] <= 1032 and len(told) == 1
    judge(later)  # older than 30 s: dead at once
    assert now[0] <= 1032
    write(2)

    def moves(seconds: float) -> None:
        later(seconds)
        if now[0] > 1040:
            write(3)

    with pytest.raises(RunProblem, match="still alive") as caught:
        judge(moves)
    assert "--takeover" in caught.value.hint
