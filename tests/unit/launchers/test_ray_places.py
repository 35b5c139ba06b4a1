"""Where agents go on a Ray cluster, without a Ray cluster."""

from perdure.launchers.ray_places import Need, RayNode, node_label, places, shortage
from perdure.runtime.spec import JobSpec

NEED = Need(kind="GPU", count=4)


def node(name: str, free: float, total: float = 8) -> RayNode:
    return RayNode(node_id=name * 8, name=name, free={"GPU": free}, total={"GPU": total})


def names(nodes: list[RayNode]) -> list[str]:
    return [n.name for n in nodes]


def test_the_emptiest_nodes_come_first_and_ties_go_by_name() -> None:
    nodes = [node("c", 8), node("b", 4), node("a", 8), node("d", 3)]
    assert names(places(nodes, NEED, (), ())) == ["a", "c", "b"]


def test_one_agent_a_node_and_none_on_an_excluded_one() -> None:
    nodes = [node("a", 8), node("b", 8), node("c", 8)]
    assert names(places(nodes, NEED, {"a"}, {"b"})) == ["c"]


def test_cards_are_what_is_needed_not_processors() -> None:
    cpu_only = RayNode(node_id="x", name="x", free={"CPU": 64}, total={"CPU": 64})
    assert places([cpu_only], NEED, (), ()) == []
    spec = JobSpec(
        run="r", entry="script", argv=("s",), cwd="/", store="file:///r", nproc_per_node=2
    )
    assert Need.of(spec) == Need(kind="CPU", count=2)


def test_each_node_that_cannot_be_used_is_named_with_its_reason() -> None:
    nodes = [node("a", 8), node("b", 8), node("c", 3), node("d", 8)]
    told = shortage(nodes, NEED, {"a"}, {"b"}, {"d": "no agent came up there"})
    assert told == (
        "no further node has 4 free GPU (b: excluded; c: 3 of 8 free; d: no agent came up there)"
    )
    assert shortage([], NEED, (), (), {}).endswith("(the Ray cluster has no other node)")
    many = [node(f"n{i:02}", 0) for i in range(20)]
    assert shortage(many, NEED, (), (), {}).endswith("n07: 0 of 8 free; and 12 more)")


def test_a_host_that_came_back_is_another_node() -> None:
    assert node_label("10.0.0.5", "aabbccddeeff") == "10.0.0.5-aabbcc"
    assert node_label("10.0.0.5", "aabbccddeeff") != node_label("10.0.0.5", "ddbbccddeeff")
    assert "/" not in node_label("rack/1 host", "00112233")
