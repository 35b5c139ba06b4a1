"""The page between agent and rank, and the hooks that write it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from perdure.runtime import beatpage, worker
from perdure.runtime.beatpage import BeatPage


@pytest.fixture
def page() -> Iterator[BeatPage]:
    fd = beatpage.create()
    made = BeatPage(fd)
    os.close(fd)
    yield made
    made.close()


def test_a_new_page_is_alive_and_at_the_start(page: BeatPage) -> None:
    view = page.read()
    assert (view.step, view.phase, view.loss, view.total, view.uses_due) == (
        0,
        "start",
        None,
        None,
        False,
    )
    assert view.age_s < 60


def test_both_sides_see_the_same_page() -> None:
    fd = beatpage.create()
    rank, agent = BeatPage(fd), BeatPage(fd)
    os.close(fd)
    rank.write_step(7)
    rank.write_loss(0.5)
    rank.write_phase(beatpage.SAVE)
    rank.words[beatpage.TOTAL] = 100
    view = agent.read()
    assert (view.step, view.loss, view.phase, view.total) == (7, 0.5, "save", 100)
    rank.close()
    agent.close()


def test_age_counts_from_the_last_sign_of_life(page: BeatPage) -> None:
    page.write_step(1)
    at_ns = page.words[beatpage.ALIVE_AT]
    assert page.read(at_ns + 2_500_000_000).age_s == 2.5
    assert page.read(at_ns - 1).age_s == 0.0


def test_another_descriptor_is_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("something else")
    os.ftruncate(fd, beatpage.SIZE_BYTES)
    with pytest.raises(ValueError, match="no beat page"):
        BeatPage(fd)
    monkeypatch.setenv(beatpage.BEAT_FD_VARIABLE, str(fd))
    assert beatpage.from_environment() is None
    os.close(fd)
    assert beatpage.from_environment() is None
    monkeypatch.delenv(beatpage.BEAT_FD_VARIABLE)
    assert beatpage.from_environment() is None


def test_the_step_is_the_largest_count_of_one_optimizer(page: BeatPage) -> None:
    class Optimizer:
        pass

    _before, after = worker.hooks(page)
    one, two = Optimizer(), Optimizer()
    for _ in range(3):
        after(one, (), {})
        after(two, (), {})
    after(two, (), {})
    assert page.step == 4
    assert page.read().phase == "train"


def test_an_optimizer_made_later_counts_from_nothing(page: BeatPage) -> None:
    class Optimizer:
        pass

    _before, after = worker.hooks(page)
    for _ in range(5):
        after(Optimizer(), (), {})
    assert page.step == 1, "a dead optimizer's count must not go to one with its address"


def test_the_script_s_own_steps_win(page: BeatPage) -> None:
    class Optimizer:
        pass

    _before, after = worker.hooks(page)
    page.counted_by_script = True
    page.write_step(1000)
    after(Optimizer(), (), {})
    assert page.step == 1000


def test_the_first_step_wakes_the_agent_once(
    page: BeatPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Optimizer:
        pass

    wake = os.eventfd(0)
    monkeypatch.setattr(beatpage, "wake_fd", wake)
    optimizer = Optimizer()
    _before, after = worker.hooks(page)
    after(optimizer, (), {})
    after(optimizer, (), {})
    assert os.eventfd_read(wake) == 1
    os.close(wake)


def test_a_fence_that_has_passed_ends_the_rank_before_its_step(
    page: BeatPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(os, "write", lambda _fd, data: len(data))
    before, _after = worker.hooks(page)
    before(None, (), {})
    page.words[beatpage.FENCE] = 1 << 62
    before(None, (), {})
    assert codes == []
    page.words[beatpage.FENCE] = 1
    before(None, (), {})
    assert codes == [worker.FENCED]
