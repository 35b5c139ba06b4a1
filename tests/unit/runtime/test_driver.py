"""The driver against agents without processes: what goes over the wire, and what comes of it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from perdure.checkpoint import lineage
from perdure.checkpoint.errors import StoreUnreachable
from perdure.runtime import journal
from perdure.runtime.errors import StoreProblem

Script = Iterator[Callable[[Any, Any], bool]]


def test_a_job_runs_to_its_end(make_world: Any, until: Any) -> None:
    world = make_world(nnodes=2)
    first, second = world.agents

    def script() -> Script:
        yield until("running")
        first.beat(3, loss=2.5, total=10)
        second.beat(4)
        yield lambda status, lines: status["step"] == 3 and status["loss"] == 2.5
        for agent in world.agents:
            agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    launch = first.launch
    assert launch["members"] == [["n0", 0, 0, 2], ["n1", 1, 2, 2]]
    assert (launch["master_addr"], launch["master_port"]) == ("127.0.0.1", 20000)
    assert (launch["attempt"], launch["restarts"], launch["restore"]) == ("1.1", 0, None)
    assert [peer[0] for peer in launch["peers"]] == ["n0", "n1"]
    assert "ack" in first.kinds() and first.kinds()[-1] == "shutdown"
    assert world.cluster.closed == 1
    view = journal.read(world.store)
    assert view.finished is not None and view.finished[0] == 0
    kinds = [line["kind"] for line in view.events()]
    for kind in ("started", "request_nodes", "launch_gang", "gang_started", "rank_exited"):
        assert kind in kinds
    assert "beats_seen" not in kinds
    assert [a.attempt for a in lineage.read_history(world.store).attempts] == ["1.1"]
    assert world.statuses[-1]["exit_code"] == 0 and world.statuses[-1]["total_steps"] == 10


def test_a_dead_rank_is_answered_by_stop_and_launch(make_world: Any, until: Any) -> None:
    world = make_world(nnodes=2)
    first, second = world.agents

    def script() -> Script:
        yield until("running")
        second.exited(2, signal=9)
        yield lambda status, lines: status["attempt"] == "1.2" and status["phase"] == "running"
        for agent in world.agents:
            agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    stop = next(m for m in first.heard if m["kind"] == "stop")
    assert (stop["attempt"], stop["grace_s"]) == ("1.1", 0)
    # A fresh rendezvous port, as told with `stopped`.
    assert first.launch["attempt"] == "1.2" and first.launch["master_port"] == 20001
    assert first.launch["restarts"] == 1
    assert world.statuses[-1]["faults"][0]["kind"] == "rank_signal"


def test_a_node_whose_port_refuses_is_replaced_at_once(make_world: Any, until: Any) -> None:
    world = make_world(nnodes=2, spares=1)
    lost = world.agents[1]

    def script() -> Script:
        yield until("running")
        lost.die()
        yield lambda status, lines: status["attempt"] == "1.2" and status["phase"] == "running"
        for agent in (world.agents[0], world.agents[2]):
            agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    why = next(line["why"] for line in world.lines if line["kind"] == "node_lost")
    assert "the port refuses" in why
    assert [m[0] for m in world.agents[0].launch["members"]] == ["n0", "n2"]


def test_a_broken_link_is_dialled_again_and_costs_nothing(make_world: Any, until: Any) -> None:
    world = make_world()
    (agent,) = world.agents

    def script() -> Script:
        yield until("running")
        agent.links.pop().close()
        agent.heard.clear()
        yield lambda status, lines: "job" in agent.kinds()
        agent.beat(5)
        yield lambda status, lines: status["step"] == 5
        agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert "node_lost" not in world.kinds() and world.kinds().count("launch_gang") == 1


def test_a_command_lost_with_its_link_is_sent_again(make_world: Any, until: Any) -> None:
    world = make_world()
    (agent,) = world.agents
    agent.deaf.add("launch")

    def script() -> Script:
        yield lambda status, lines: "launch" in agent.kinds()
        agent.deaf.clear()
        agent.links.pop().close()
        yield until("running")
        agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert agent.kinds().count("launch") == 2


@pytest.mark.slow
def test_a_silent_node_gets_no_ack_and_is_given_up(make_world: Any, until: Any) -> None:
    world = make_world(spares=1)
    world.quick()
    lost, spare = world.agents
    lost.deaf |= {"stop"}

    def script() -> Script:
        yield until("running")
        lost.deaf |= {"hello", "job", "launch", "stop", "ack"}

        def silence(status: Any, lines: Any) -> bool:
            spare.say(kind="beat", seq=0, attempt=None, ranks={})
            return bool(status["attempt"] == "1.2" and status["phase"] == "running")

        yield silence
        spare.all_exit(exit_code=0)

    assert world.run(script()) == 0
    fault = world.statuses[-1]["faults"][0]
    assert (fault["kind"], fault["node"]) == ("node_silent", "n0")
    assert [m[0] for m in spare.launch["members"]] == ["n1"]


def test_a_launch_that_fails_is_stopped_and_tried_again(make_world: Any, until: Any) -> None:
    world = make_world(nnodes=2)
    first, second = world.agents
    second.deaf.add("launch")

    def script() -> Script:
        yield lambda status, lines: "launch" in second.kinds()
        second.deaf.clear()
        second.say(kind="failed", attempt="1.1", why="no such file")
        yield lambda status, lines: status["attempt"] == "1.2" and status["phase"] == "running"
        for agent in world.agents:
            agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert "no such file" in world.statuses[-1]["faults"][0]["because"]
    assert [m["attempt"] for m in first.heard if m["kind"] == "stop"] == ["1.1"]


def test_a_save_names_a_step_ahead_and_a_later_one_when_too_late(
    make_world: Any, until: Any
) -> None:
    world = make_world()
    (agent,) = world.agents
    agent.deaf.add("save")

    def script() -> Script:
        yield until("running")
        agent.beat(10, uses_due=True)
        yield lambda status, lines: status["step"] == 10
        world.driver.ask_save("perdure save")
        yield lambda status, lines: "save" in agent.kinds()
        named = next(m for m in agent.heard if m["kind"] == "save")
        agent.say(kind="save_set", attempt="1.1", step=named["step"], too_late=True)
        yield lambda status, lines: agent.kinds().count("save") == 2
        agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    steps = [m["step"] for m in agent.heard if m["kind"] == "save"]
    assert steps[0] >= 12 and steps[1] > steps[0]


def test_a_stop_asked_from_a_signal_handler(make_world: Any, until: Any) -> None:
    world = make_world()

    def script() -> Script:
        yield until("running")
        world.driver.ask_stop("SIGTERM", 143)

    assert world.run(script()) == 143
    stop = next(m for m in world.agents[0].heard if m["kind"] == "stop")
    assert stop["grace_s"] == world.spec.timers.stop_grace_s


def test_secrets_go_to_agents_and_nowhere_else(make_world: Any, until: Any) -> None:
    world = make_world()
    (agent,) = world.agents
    world.spec = replace(world.spec, secret_env=("KEY",))
    world.secrets = {"KEY": "s3cr3t", "OTHER": "not asked for"}

    def script() -> Script:
        yield until("running")
        agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert agent.secrets == {"KEY": "s3cr3t"}
    entries = world.store.list()
    assert entries and not any(b"s3cr3t" in world.store.get(entry.key) for entry in entries)
    assert "s3cr3t" not in str(world.lines)


def test_a_store_that_cannot_be_read_ends_the_job_before_it_begins(make_world: Any) -> None:
    world = make_world()
    driver = world.make()

    def away(prefix: str) -> Any:
        raise StoreUnreachable("connection refused", hint="look at the endpoint")

    world.store._list = away
    with pytest.raises(StoreProblem, match="connection refused"):
        driver.run()
    assert "launch" not in world.agents[0].kinds()


def test_an_outage_of_the_store_does_not_stop_a_restart(make_world: Any, until: Any) -> None:
    world = make_world()
    (agent,) = world.agents
    tried: list[str] = []

    def away(key: str, data: Any, create: bool) -> None:
        tried.append(key)
        raise StoreUnreachable("connection refused", hint="")

    def script() -> Script:
        yield until("running")
        real, world.store._put = world.store._put, away
        agent.exited(0, signal=9)
        yield lambda status, lines: status["attempt"] == "1.2" and status["phase"] == "running"
        yield lambda status, lines: bool(tried)
        world.store._put = real
        agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert tried


def test_nonsense_from_an_agent_is_said_and_survived(make_world: Any, until: Any) -> None:
    world = make_world()
    (agent,) = world.agents

    def script() -> Script:
        yield until("running")
        agent.say(kind="beat", seq=1, attempt="1.1", ranks={"x": {}})
        agent.say(kind="exited", attempt="one", report={})
        agent.say(kind="sing")
        yield (
            lambda status, lines: (
                len([n for n in world.lines if "does not fit" in n.get("text", "")]) == 3
            )
        )
        agent.all_exit(exit_code=0)

    assert world.run(script()) == 0
