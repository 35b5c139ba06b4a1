"""What every cluster promises the driver. One test for all of them: a new cluster adds a maker."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure.launchers.cluster_local import LocalCluster, new_token
from perdure.runtime import sweep
from perdure.runtime.cluster import AgentEndpoint, Cluster, ClusterView
from perdure.runtime.spec import JobSpec
from perdure.runtime.wire import dial

RUN = "contract"
NODES = 3
PATIENCE_S = 60.0


def make_local(request: pytest.FixtureRequest) -> Cluster:
    return LocalCluster(RUN, slots=1, token=new_token(), owned=False, warm=False, nodes=NODES)


def make_ray(request: pytest.FixtureRequest) -> Cluster:
    import ray

    from perdure.launchers.cluster_ray import RayCluster

    nodes = request.getfixturevalue("ray_nodes")
    if not ray.is_initialized():
        ray.init(address=nodes.address, namespace="perdure", log_to_driver=False)
    spec = JobSpec(
        run=RUN,
        entry="script",
        argv=("train.py",),
        cwd="/",
        store="file:///unused",
        nproc_per_node=2,  # all that a node has, so that a second agent would not fit
        warm=False,
    )
    return RayCluster(spec)


MAKERS: dict[str, Callable[[pytest.FixtureRequest], Cluster]] = {
    "local": make_local,
    "ray": make_ray,
}


@pytest.fixture(params=MAKERS)
def cluster(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Cluster]:
    monkeypatch.setenv("PERDURE_HOME", str(tmp_path))
    made = MAKERS[request.param](request)
    yield made
    made.close()
    assert sweep.marked(**{sweep.RUN_MARK: RUN}) == []


def wait_for(cluster: Cluster, good: Callable[[ClusterView], bool]) -> ClusterView:
    """Polls as the driver does; each poll is quick. `lost` of all polls is put together."""
    end_s, lost = time.monotonic() + PATIENCE_S, []
    while True:
        begun_s = time.monotonic()
        view = cluster.poll()
        assert time.monotonic() - begun_s < 5.0, "poll blocked"
        lost += view.lost
        if good(ClusterView(agents=view.agents, lost=tuple(lost), waiting_for=view.waiting_for)):
            return ClusterView(agents=view.agents, lost=tuple(lost), waiting_for=view.waiting_for)
        assert time.monotonic() < end_s, f"it stayed at {view}, lost {lost}"
        time.sleep(0.02)


def up(count: int) -> Callable[[ClusterView], bool]:
    return lambda view: len(view.agents) == count


def hello(endpoint: AgentEndpoint) -> dict[str, Any]:
    peer = dial(endpoint.host, endpoint.port, endpoint.token, 10.0)
    try:
        peer.send({"kind": "hello", "run": RUN, "term": 0})
        welcome = peer.receive(10.0)
        assert welcome is not None
        return welcome
    finally:
        peer.close()


def warden_of(node: str) -> int:
    """The top process of a node: what carries its mark, and whose parent does not."""
    pids = sweep.marked(**{sweep.RUN_MARK: RUN, sweep.NODE_MARK: node})
    (top,) = [pid for pid in pids if not any(pid in sweep.children(p) for p in pids)]
    return top


def test_agents_come_up_on_as_many_nodes_and_answer(cluster: Cluster) -> None:
    cluster.request(2, frozenset())
    view = wait_for(cluster, up(2))
    assert len({endpoint.node for endpoint in view.agents}) == 2
    for endpoint in view.agents:
        welcome = hello(endpoint)
        assert (welcome["kind"], welcome["node"]) == ("welcome", endpoint.node)
        assert welcome["attempt"] is None and welcome["slots"] == endpoint.slots
        assert welcome["rendezvous_port"]
        assert endpoint.token not in repr(endpoint)
    cluster.request(2, frozenset())  # the same again changes nothing
    assert wait_for(cluster, up(2)).agents == view.agents


def test_more_may_be_asked_for_and_those_that_are_up_stay(cluster: Cluster) -> None:
    cluster.request(1, frozenset())
    first = wait_for(cluster, up(1)).agents
    cluster.request(NODES, frozenset())
    assert set(first) <= set(wait_for(cluster, up(NODES)).agents)
    cluster.request(NODES + 9, frozenset())  # more than there are, whichever cluster it is
    assert wait_for(cluster, lambda view: bool(view.waiting_for)).waiting_for


def test_a_dead_agent_is_told_once_and_replaced(cluster: Cluster) -> None:
    cluster.request(2, frozenset())
    before = wait_for(cluster, up(2)).agents
    victim = before[0]
    os.kill(warden_of(victim.node), signal.SIGKILL)

    def replaced(view: ClusterView) -> bool:
        return bool(view.lost) and len(view.agents) == 2 and victim not in view.agents

    view = wait_for(cluster, replaced)
    assert [node for node, _why in view.lost] == [victim.node]
    assert before[1] in view.agents
    assert wait_for(cluster, up(2)).lost == ()


def test_an_excluded_node_is_ended_and_another_takes_its_place(cluster: Cluster) -> None:
    cluster.request(2, frozenset())
    bad, good = wait_for(cluster, up(2)).agents
    cluster.request(2, frozenset({bad.node}))

    def moved(view: ClusterView) -> bool:
        return len(view.agents) == 2 and bad.node not in {e.node for e in view.agents}

    view = wait_for(cluster, moved)
    assert good in view.agents
    end_s = time.monotonic() + PATIENCE_S
    while sweep.marked(**{sweep.RUN_MARK: RUN, sweep.NODE_MARK: bad.node}):
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_close_leaves_nothing_and_may_be_said_twice(cluster: Cluster) -> None:
    cluster.request(2, frozenset())
    wait_for(cluster, up(2))
    begun_s = time.monotonic()
    cluster.close()
    assert time.monotonic() - begun_s < 15.0
    assert sweep.marked(**{sweep.RUN_MARK: RUN}) == []
    cluster.close()
