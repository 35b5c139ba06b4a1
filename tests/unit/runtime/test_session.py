"""What a script may call, without an agent and with one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import perdure
from perdure.runtime import beatpage
from perdure.runtime.beatpage import BeatPage
from perdure.runtime.errors import UsageError


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PERDURE_STORE", "PERDURE_SAVE_EVERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(beatpage, "mine", None)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[BeatPage]:
    fd = beatpage.create()
    made = BeatPage(fd)
    os.close(fd)
    monkeypatch.setattr(beatpage, "mine", made)
    yield made
    made.close()


def dues(run: object, steps: range) -> list[int]:
    return [step for step in steps if run.due(step)]  # type: ignore[attr-defined]


def test_plain_python_is_a_gang_of_one_that_saves_now_and_then() -> None:
    run = perdure.init()
    assert (run.rank, run.world_size, run.local_rank, run.attempt) == (0, 1, 0, None)
    assert dues(run, range(2001)) == [1000, 2000]
    run.beat(3, loss=1.0)
    with run.phase("eval"):
        pass
    with pytest.raises(UsageError, match="no store"):
        run.checkpointer()


def test_the_script_s_interval_wins_over_the_job_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_SAVE_EVERY", "4")
    assert dues(perdure.init(), range(9)) == [4, 8]
    assert dues(perdure.init(save_every=3), range(9)) == [3, 6]


def test_under_an_agent_without_an_interval_only_the_controller_asks(page: BeatPage) -> None:
    run = perdure.init()
    page.words[beatpage.SAVE_AT] = 7
    assert dues(run, range(3000)) == [7]
    assert page.read().uses_due
    assert page.step == 2999


def test_beats_and_phases_are_on_the_page(page: BeatPage) -> None:
    run = perdure.init(total_steps=50)
    run.beat(5, loss=0.25)
    view = page.read()
    assert (view.step, view.loss, view.total, view.phase) == (5, 0.25, 50, "train")
    with run.phase("eval"):
        assert page.read().phase == "eval"
    with run.phase("something else"):
        assert page.read().phase == "other"
    assert page.read().phase == "train"


def test_a_loss_on_a_device_is_not_fetched(page: BeatPage) -> None:
    class Device:
        type = "cuda"

    class Loss:
        device = Device()

        def __float__(self) -> float:
            raise AssertionError("this would wait for the device")

    perdure.init().beat(1, loss=Loss())
    assert page.read().loss is None


@pytest.mark.parametrize("name", ["save_every", "total_steps"])
def test_numbers_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        perdure.init(**{name: 0})
