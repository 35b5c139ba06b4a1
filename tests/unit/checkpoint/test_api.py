"""The Checkpointer's own rules, and how ranks without an agent agree."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from perdure.checkpoint import meeting
from perdure.checkpoint.errors import ForkError, StateError
from perdure.checkpoint.lineage import mark_bad, read_history
from perdure.checkpoint.manifest import Point
from perdure.checkpoint.store import open_store


def test_nothing_to_restore_is_none_and_lays_the_arena_out(node: Any) -> None:
    rank = node.rank()
    assert rank.restore({"w": torch.ones(3)}) is None
    assert rank.ready(10)


def test_the_same_step_again_is_the_same_save(node: Any) -> None:
    rank = node.rank()
    handle = rank.save(3, {"w": torch.ones(3)})
    assert rank.save(3, {"w": torch.zeros(3)}) is handle
    with pytest.raises(StateError, match="step 2 comes after step 3"):
        rank.save(2, {"w": torch.ones(3)})


def test_a_rank_does_not_overrule_the_controller(node: Any) -> None:
    point = node.save(3, [{"w": torch.ones(3)}])
    with pytest.raises(StateError, match="restores step 3 of attempt 1.1, not step 1"):
        node.rank(attempt="1.2", restore=point).restore({"w": torch.ones(3)}, step=1)


def test_a_handle_knows_when_it_is_done(node: Any) -> None:
    rank = node.rank(0, 2)
    handle = rank.save(1, {"w": torch.ones(3)})
    with pytest.raises(TimeoutError, match="step 1"):
        handle.wait(0)  # rank 1 has not saved
    assert not handle.done()
    node.rank(1, 2).save(1, {"w": torch.ones(3)})
    assert handle.wait(10).step == 1
    assert handle.done()


def test_another_runs_url_is_refused_by_the_nodes_uploader(node: Any) -> None:
    rank = node.rank()
    rank._client._url = "memory://another"
    with pytest.raises(StateError, match="not memory://another"):
        rank.prepare({"w": torch.ones(1)})


def test_a_forked_child_is_refused_at_once(node: Any) -> None:
    rank = node.rank()
    rank.save(1, {"w": torch.ones(1)}).wait(10)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            rank.save(2, {"w": torch.ones(1)})
        except ForkError:
            os.write(write, b"refused")
        finally:
            os._exit(0)
    os.close(write)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.read(read, 100) == b"refused"
    os.close(read)
    assert rank.save(2, {"w": torch.ones(1)}).wait(10).step == 2  # the parent's socket is whole


def test_rank_zero_decides_for_the_newest_good_commit_on_the_line(node: Any) -> None:
    for step in (1, 2):
        node.save(step, [{"w": torch.ones(1)}], attempt=f"1.{step}")
    store = node.store
    assert meeting.decide(store, restore=True, step=None)["restore"]["step"] == 2
    mark_bad(store, Point(2, "1.2"), "a test")
    decided = meeting.decide(store, restore=False, step=None)
    assert decided["restore"] is None
    again = meeting.decide(store, restore=True, step=1)
    assert again["restore"] == {"step": 1, "attempt": "1.1"}
    assert again["attempt"] != decided["attempt"]
    with pytest.raises(StateError, match="no good checkpoint of step 2"):
        meeting.decide(store, restore=True, step=2)
    assert read_history(store).newest_attempt == again["attempt"]


def test_rank_zero_does_not_start_from_nothing_where_all_commits_are_damaged(node: Any) -> None:
    node.save(1, [{"w": torch.ones(1)}], attempt="1.1")
    mark_bad(node.store, Point(1, "1.1"), "a test")
    with pytest.raises(StateError, match="is marked bad: a test"):
        meeting.decide(node.store, restore=True, step=None)
    assert read_history(node.store).newest_attempt == "1.1", "no attempt was taken for it"


def test_an_answer_to_yesterdays_question_is_not_taken_for_todays() -> None:
    store = open_store("memory://meeting")
    store.put("checkpoints/meet/place/answer-0123", b'{"attempt": "1.1", "restore": null}')
    store.put("checkpoints/meet/place/ask-1-dead", b"?")  # of a launch that died
    meeting.answer_all(store, "place", {"attempt": "1.9", "restore": None}, 2)
    assert meeting.ask(store, "place", 1)["attempt"] == "1.9"
