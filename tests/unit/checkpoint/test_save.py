"""What a rank puts into a checkpoint: flattening, sharing the work, and one copy of everything."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch

from perdure.checkpoint.errors import StateError, StoreError
from perdure.checkpoint.flatten import flatten, rank_of
from perdure.checkpoint.lineage import (
    commit_complete,
    line,
    load_commit,
    load_manifest,
    load_receipts,
    read_history,
)
from perdure.checkpoint.save import check_step
from perdure.checkpoint.shards import share_of
from perdure.checkpoint.store import MemoryStore


def test_paths_leaves_and_whole_containers() -> None:
    state = {
        "model": torch.nn.Linear(2, 2),
        "nested": [{"t": torch.ones(1)}, 5],
        "plain": {"a": (1, 2), 3: [None]},
        "step": 7,
        "rng": {"rank0": (1, 2)},
    }
    flat = flatten(state)
    assert list(flat.tensors) == ["model.weight", "model.bias", "nested.0.t"]
    assert flat.leaves == {
        "nested.1": 5,
        "plain": {"a": (1, 2), 3: [None]},
        "step": 7,
        "rng.rank0": (1, 2),
    }


def test_the_table_refers_to_the_live_tensors() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    flat = flatten({"w": weight})
    assert flat.tensors["w"] is weight


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "same name 'a.b'"),
        ({1.5: torch.ones(1)}, "key 1.5"),
        ([1, 2], "the state is a list"),
        ({"s": torch.ones(2).to_sparse()}, "layout torch.sparse_coo"),
        ({"m": torch.empty(2, device="meta")}, "meta device"),
    ],
)
def test_what_cannot_be_stored_is_named(state: Any, said: str) -> None:
    with pytest.raises(StateError, match=said):
        share_of(flatten(state), 0, 1)


def test_every_replicated_tensor_is_written_once_and_the_work_is_even() -> None:
    state = {f"t{i}": torch.zeros(100 + i) for i in range(40)} | {"step": 1}
    shares = [share_of(flatten(state), rank, 4) for rank in range(4)]
    written = [part.slot.fqn for share in shares for part in share.parts]
    assert sorted(written) == sorted(f"t{i}" for i in range(40))
    loads = [sum(part.slot.nbytes for part in share.parts) for share in shares]
    assert max(loads) < 1.1 * min(loads)
    assert [share.leaves for share in shares] == [{"step": 1}, {}, {}, {}]
    assert len({share.names for share in shares}) == 1


def test_a_rank_writes_its_own_entries_and_only_those() -> None:
    def state(rank: int) -> dict[str, Any]:
        return {"w": torch.zeros(4), "rng": {f"rank{rank}": {"t": torch.zeros(9), "n": rank}}}

    shares = [share_of(flatten(state(rank)), rank, 2) for rank in range(2)]
    written = [[part.slot.fqn for part in share.parts] for share in shares]
    assert written == [["rng.rank0.t", "w"], ["rng.rank1.t"]]
    assert [share.leaves for share in shares] == [{"rng.rank0.n": 0}, {"rng.rank1.n": 1}]
    assert shares[0].names == shares[1].names


def test_only_a_whole_key_makes_an_entry_of_one_rank() -> None:
    assert rank_of("rng.rank12.torch") == 12
    assert rank_of("lora.rank12x.weight") is None
    assert rank_of("low_rank1") is None


def test_tied_tensors_are_stored_once_and_views_of_them_are_not_tied() -> None:
    base = torch.arange(6.0)
    state = {"a": base, "b": base, "head": base[:3], "rows": base.view(2, 3)}
    share = share_of(flatten(state), 0, 1)
    assert share.aliases == {"b": "a"}
    assert sorted(part.slot.fqn for part in share.parts) == ["a", "head", "rows"]


@pytest.mark.parametrize(("step", "last"), [(-1, None), (1.0, None), (True, None), (3, 4)])
def test_steps_are_numbers_that_rise(step: Any, last: int | None) -> None:
    with pytest.raises(StateError, match="step"):
        check_step(step, last)


def odd_state() -> dict[str, torch.Tensor]:
    """Everything that is easily got wrong."""
    torch.manual_seed(1)
    return {
        "0d": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False, True]),
        "bf16": torch.randn(5, 7).bfloat16(),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "e8m0": torch.ones(3, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "c128": torch.randn(3, dtype=torch.complex128),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "transposed": torch.randn(4, 3).t(),
        "strided": torch.randn(10)[::3],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "i64": torch.tensor([-(2**62)]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (x.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def test_what_lies_in_the_store_is_a_plain_safetensors_file(node: Any) -> None:
    state = odd_state()
    node.save(3, [state])
    loaded = safetensors.torch.load(node.store.get(node.objects(".safetensors")[0]))
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert same_bits(loaded[name], tensor), name


def test_a_save_holds_the_state_as_it_was_when_save_returned(node: Any) -> None:
    weight = torch.ones(1000)
    handle = node.rank().save(1, {"w": weight})
    weight.fill_(9)
    handle.wait(10)
    loaded = safetensors.torch.load(node.store.get(node.objects(".safetensors")[0]))
    assert loaded["w"].eq(1).all()


def test_many_saves_pass_through_two_arenas_and_a_moved_tensor_is_read_where_it_is(
    node: Any,
) -> None:
    rank = node.rank()
    handles = []
    for step in range(6):
        # A new tensor each time: a cache of addresses would write the first one for ever.
        handles.append(rank.save(step, {"w": torch.full((2000,), float(step))}))
    assert [handle.wait(10).step for handle in handles] == list(range(6))
    for step, key in enumerate(node.objects(".safetensors")):
        assert safetensors.torch.load(node.store.get(key))["w"].eq(step).all()


def test_a_state_that_changes_its_shape_is_laid_out_anew(node: Any) -> None:
    rank = node.rank()
    rank.save(1, {"w": torch.zeros(3)}).wait(10)
    rank.save(2, {"w": torch.zeros(5000), "more": torch.ones(2).half()}).wait(10)
    loaded = safetensors.torch.load(node.store.get(node.objects(".safetensors")[1]))
    assert loaded["w"].shape == (5000,)
    assert loaded["more"].dtype == torch.float16


def test_the_receipt_has_a_digest_for_every_block_and_the_manifest_resolves_ties(node: Any) -> None:
    tied = torch.randn(200_000)
    point = node.save(4, [{"a": tied, "b": tied, "step": 4}])
    manifest = load_manifest(node.store, load_commit(node.store, point))
    receipt = load_receipts(node.store, manifest)[0]
    assert len(receipt.crc32c) == -(-800_000 // receipt.block)
    assert dict(manifest.aliases) == {"b": "a"}
    assert dict(manifest.leaves) == {"step": 4}


def test_ranks_that_hold_different_names_are_refused_and_nothing_is_committed(node: Any) -> None:
    ranks = [node.rank(i, 2) for i in range(2)]
    states = [{"w": torch.ones(2)}, {"w": torch.ones(2), "extra": torch.ones(2)}]
    handles = [rank.save(1, state) for rank, state in zip(ranks, states, strict=True)]
    for handle in handles:
        with pytest.raises(StateError, match="different names"):
            handle.wait(10)
    assert not node.store.list("checkpoints/commits")
    assert "different names" in node.told()[0]["text"]


def test_the_agent_is_told_of_a_commit_once(node: Any) -> None:
    node.save(8, [{"w": torch.ones(2)}] * 2)
    assert node.told() == [{"kind": "committed", "attempt": "1.1", "step": 8, "tier": "store"}]


class Dying(MemoryStore):
    """The store as an uploader sees it that is killed at its n-th put: nothing goes through after."""

    def __init__(self, url: str, puts: int) -> None:
        super().__init__(url)
        self.left = puts

    def _put(self, key: str, data: Any, create: bool) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoreError("killed")
        super()._put(key, data, create)


@pytest.mark.parametrize("puts", range(9))
def test_whatever_put_is_the_last_a_step_is_whole_or_does_not_exist(
    node: Any, puts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.checkpoint.uploads.COMMIT_WAIT_S", 0.0)
    states = [{"a": torch.randn(100), "b": torch.randn(70), "step": 1}] * 2
    dying = Dying(node.url, puts)
    node.uploader._opened = dying
    ranks = [node.rank(i, 2) for i in range(2)]
    for rank, state in zip(ranks, states, strict=True):
        rank.save(1, state)
        assert node.uploader.uploads.drain(10)  # one after the other: the puts have one order
    killed = dying.left < 0
    node.uploader._opened = None
    commit_complete(node.store)  # what a controller does that recovers
    points = [commit.point for commit in line(read_history(node.store))]
    # The attempt, two objects, two receipts: from there on anybody can finish. Then manifest, commit.
    assert bool(points) == (puts >= 5)
    assert killed == (puts < 7)
    for point in points:
        found = {"a": torch.zeros(100), "b": torch.zeros(70), "step": 0}
        node.rank(attempt="1.2", restore=point).restore(found)
        assert torch.equal(found["a"], states[0]["a"])
        assert torch.equal(found["b"], states[0]["b"])
