"""What comes back: every bit or nothing, on as many ranks as there are now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from perdure.checkpoint.errors import IntegrityError, StateError, StoreError
from perdure.checkpoint.lineage import load_commit
from perdure.checkpoint.manifest import Point


def flip(data: bytearray) -> None:
    data[-1] ^= 1


@contextmanager
def as_rank(rank: int, of: int) -> Iterator[None]:
    """A process group that only knows its place: enough for meshes and local shards."""
    dist.init_process_group("fake", rank=rank, world_size=of, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(whole: torch.Tensor, shape: tuple[int, ...], placements: list[Any]) -> DTensor:
    """This rank's part of `whole`, cut here: the fake group moves no bytes."""
    mesh = init_device_mesh("cpu", shape)
    tensor = distribute_tensor(torch.zeros_like(whole), mesh, placements, src_data_rank=None)
    local = whole
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            chunks = local.chunk(shape[dim], placement.dim)
            at = mesh.get_local_rank(dim)
            local = chunks[at] if at < len(chunks) else local.narrow(placement.dim, 0, 0)
    tensor.to_local().copy_(local)
    return tensor


def save_sharded(node: Any, whole: torch.Tensor, shape: tuple[int, ...], cut: list[Any]) -> Point:
    world = int(torch.Size(shape).numel())
    handles = []
    for rank in range(world):
        with as_rank(rank, world):
            handles.append(node.rank(rank, world).save(5, {"w": sharded(whole, shape, cut)}))
    for handle in handles:
        handle.wait(10)
    return Point(5, "1.1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((1,), [Shard(0)]),
        ((2,), [Shard(0)]),
        ((8,), [Shard(0)]),
        ((3,), [Shard(1)]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((16,), [Shard(0)]),  # more ranks than rows: some hold nothing
    ],
)
def test_four_shards_restored_on_any_other_mesh(
    node: Any, shape: tuple[int, ...], cut: list[Any]
) -> None:
    whole = torch.randn(10, 6)
    point = save_sharded(node, whole, (4,), [Shard(0)])
    world = int(torch.Size(shape).numel())
    for rank in range(world):
        with as_rank(rank, world):
            state = {"w": sharded(torch.zeros(10, 6), shape, cut)}
            expected = sharded(whole, shape, cut)
            assert node.rank(rank, world, "1.2", point).restore(state)
            assert torch.equal(state["w"].to_local(), expected.to_local())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "cut"), [((2, 2), [Shard(1), Shard(0)]), ((2, 2), [Replicate(), Shard(1)])]
)
def test_a_plain_tensor_takes_what_was_sharded(
    node: Any, shape: tuple[int, ...], cut: list[Any]
) -> None:
    whole = torch.randn(7, 5)
    point = save_sharded(node, whole, shape, cut)
    state = {"w": torch.zeros(7, 5)}
    node.rank(attempt="1.2", restore=point).restore(state)
    assert torch.equal(state["w"], whole)


def adam_state(seed: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": steps}


def test_a_fresh_optimizer_is_completed_without_a_step_and_goes_on_bit_by_bit(node: Any) -> None:
    unbroken = adam_state(0, 3)
    point = node.save(3, [unbroken])
    resumed = adam_state(1, 0)
    counted = []
    resumed["optimizer"].register_step_post_hook(lambda *_: counted.append(1))
    restored = node.rank(attempt="1.2", restore=point).restore(resumed)
    assert restored is not None
    assert restored.leaves["step"] == resumed["step"] == 3
    assert not counted
    for state in (unbroken, resumed):
        for _ in range(3):
            state["optimizer"].zero_grad()
            state["model"](torch.ones(3, 4)).sum().backward()
            state["optimizer"].step()
            state["scheduler"].step()
    for a, b in zip(unbroken["model"].parameters(), resumed["model"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert unbroken["scheduler"].state_dict() == resumed["scheduler"].state_dict()


def test_an_sgd_without_tensors_keeps_its_shape(node: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    saved = torch.optim.SGD([weight], lr=0.5)
    point = node.save(1, [{"w": weight, "o": saved}])
    fresh = torch.optim.SGD([weight], lr=0.1)
    node.rank(attempt="1.2", restore=point).restore({"w": weight, "o": fresh})
    assert fresh.param_groups[0]["lr"] == 0.5


def test_plain_values_are_set_where_they_were_found(node: Any) -> None:
    inner = {"epoch": 3, "seen": [1, 2]}
    saved = {"w": torch.ones(1), "data": inner, "parts": [torch.ones(1), 4]}
    point = node.save(1, [saved])
    mine = {"epoch": 0}
    state = {"w": torch.zeros(1), "data": mine, "parts": [torch.zeros(1), 0]}
    node.rank(attempt="1.2", restore=point).restore(state)
    assert mine == inner  # the very dict that the script holds
    assert state["parts"][1] == 4


def test_per_rank_entries_on_more_and_on_fewer_ranks(node: Any) -> None:
    def state(rank: int, value: float) -> dict[str, Any]:
        return {"w": torch.ones(2), "rng": {f"rank{rank}": torch.full((3,), value)}}

    point = node.save(1, [state(0, 1.0), state(1, 2.0)])
    third = state(2, 9.0)
    restored = node.rank(2, 3, "1.2", point).restore(third)
    assert restored is not None
    assert restored.untouched == ("rng.rank2",)
    assert third["rng"]["rank2"].tolist() == [9, 9, 9]
    alone = state(0, 9.0)
    node.rank(0, 1, "1.3", point).restore(alone)
    assert alone["rng"]["rank0"].tolist() == [1, 1, 1]


def test_every_misfit_is_listed_and_nothing_is_touched(node: Any) -> None:
    point = node.save(1, [{"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "n": 1}])
    state = {"a": torch.zeros(3), "b": torch.zeros(2).half(), "d": torch.zeros(1), "m": 0}
    with pytest.raises(StateError) as caught:
        node.rank(attempt="1.2", restore=point).restore(state)
    text = str(caught.value)
    for said in (
        "a: float32 [2] in the checkpoint, float32 [3] in the state",
        "b: float32 [2] in the checkpoint, float16 [2] in the state",
        "c: a tensor of the checkpoint that the state does not have",
        "d: a tensor of the state that the checkpoint does not have",
        "m: a value of the state that the checkpoint does not have",
    ):
        assert said in text
    assert state["a"].eq(0).all()
    assert state["b"].eq(0).all()
    assert not [line for line in node.told() if line["kind"] == "restore_failed"]


def test_a_flipped_bit_touches_nothing_and_reaches_the_agent(node: Any) -> None:
    point = node.save(6, [{"a": torch.ones(4), "b": torch.ones(100_000)}])
    node.told()
    node.alter(node.objects(".safetensors")[0], flip)
    state = {"a": torch.zeros(4), "b": torch.zeros(100_000)}
    with pytest.raises(IntegrityError, match="does not match its checksum"):
        node.rank(attempt="1.2", restore=point).restore(state)
    assert state["a"].eq(0).all()
    assert state["b"].eq(0).all()
    (line,) = node.told()
    assert (line["kind"], line["attempt"], line["rank"]) == ("restore_failed", "1.2", 0)
    assert line["point"] == {"step": 6, "attempt": "1.1"}


@pytest.mark.parametrize("what", ["manifest", "receipt", "object", "commit"])
def test_a_missing_or_altered_link_of_the_chain_is_an_error(node: Any, what: str) -> None:
    point = node.save(6, [{"a": torch.ones(4)}])
    node.told()
    if what == "commit":
        node.alter("checkpoints/commits/000000000006-1.1.json", lambda data: data.reverse())
    elif what == "manifest":
        node.alter(node.objects("manifest.json")[0], lambda data: data.reverse())
    else:
        ending = {"receipt": "receipt.json", "object": ".safetensors"}[what]
        node.store.delete(node.objects(ending)[0])
    state = {"a": torch.zeros(4)}
    with pytest.raises(Exception, match=r"altered|cut short|missing|is not in") as caught:
        node.rank(attempt="1.2", restore=point).restore(state)
    assert caught.value.hint  # type: ignore[attr-defined]
    assert state["a"].eq(0).all()
    assert [line["kind"] for line in node.told()] == ["restore_failed"]


def test_what_two_ranks_of_a_node_need_is_fetched_once(node: Any) -> None:
    weight = torch.randn(300_000)
    point = node.save(2, [{"w": weight}])
    ranks = [node.rank(i, 2, "1.2", point) for i in range(2)]
    states = [{"w": torch.zeros(300_000)} for _ in ranks]
    image = node.uploader.image(point)
    for rank, state in zip(ranks, states, strict=True):
        rank.restore(state)
        assert torch.equal(state["w"], weight)
    assert image.bytes_fetched == weight.nbytes
    assert not node.uploader.holds_images()  # the last of the node's two ranks has it


@pytest.mark.slow
def test_a_rank_fetches_little_more_than_its_rows(node: Any) -> None:
    whole = torch.randn(4096, 1024)  # 16 MiB
    point = node.save(2, [{"w": whole}])
    with as_rank(1, 4):
        state = {"w": sharded(torch.zeros(4096, 1024), (4,), [Shard(0)])}
        image = node.uploader.image(point)
        node.rank(1, 4, "1.2", point).restore(state)
        assert torch.equal(state["w"].to_local(), whole[1024:2048])
    assert image.bytes_fetched <= 1.1 * state["w"].to_local().nbytes


def test_ties_of_the_checkpoint_fill_a_state_that_has_none(node: Any) -> None:
    tied = torch.randn(5)
    point = node.save(1, [{"a": tied, "b": tied}])
    state = {"a": torch.zeros(5), "b": torch.zeros(5)}
    node.rank(attempt="1.2", restore=point).restore(state)
    assert torch.equal(state["a"], tied)
    assert torch.equal(state["b"], tied)


def test_the_commit_carries_the_restore_point_as_its_parent(node: Any) -> None:
    point = node.save(1, [{"a": torch.ones(1)}])
    rank = node.rank(attempt="1.2", restore=point)
    state = {"a": torch.zeros(1)}
    rank.restore(state)
    rank.save(2, state).wait(10)
    assert load_commit(node.store, Point(2, "1.2")).parent == point


def test_an_image_that_nobody_uses_is_given_back_but_never_under_a_fetch(
    node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = node.save(1, [{"a": torch.ones(10)}])
    monkeypatch.setattr("perdure.checkpoint.uploader.IMAGE_IDLE_S", -1.0)
    image = node.uploader.image(point)
    monkeypatch.setattr(image, "_flying", 1)
    image.close()
    assert image.fd >= 0  # a fetch may still write into it
    image._fetch_run(0, 0, 0)  # the last one
    assert image.fd < 0
    with pytest.raises(StoreError, match="given back"):
        image.share()
    node.uploader.drop_idle_images()
    assert not node.uploader.holds_images()
    state = {"a": torch.zeros(10)}
    node.rank(attempt="1.2", restore=point).restore(state)  # whoever comes later reads it anew
    assert state["a"].eq(1).all()
