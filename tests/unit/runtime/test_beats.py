from typing import Any

import pytest

from perdure.runtime.beats import WINDOW_S, Beats
from perdure.runtime.core.events import Attempt


def beats(world_size: int = 2) -> Beats:
    return Beats(Attempt(1, 1), world_size)


def rank(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "phase": 2, "age_s": 0.0, "loss": None, "total": None, **more}


def test_the_step_is_the_lowest_of_all_ranks_and_0_until_all_were_heard() -> None:
    seen = beats()
    seen.take({"0": rank(7)}, 1.0)
    assert seen.step == 0
    seen.take({"1": rank(5)}, 1.1)
    assert seen.step == 5


def test_speed_is_measured_over_a_window() -> None:
    seen = beats(1)
    for second in range(40):
        seen.take({"0": rank(1 + 2 * second)}, float(second))
    assert seen.steps_per_s == pytest.approx(2.0)
    # Twice as fast now: within a window the old speed is forgotten.
    for second in range(40, 40 + int(WINDOW_S) + 2):
        seen.take({"0": rank(79 + 4 * (second - 39))}, float(second))
    assert seen.steps_per_s == pytest.approx(4.0)


def test_one_step_is_no_speed() -> None:
    seen = beats(1)
    seen.take({"0": rank(1)}, 1.0)
    assert seen.steps_per_s == 0.0
    seen.take({"0": rank(2)}, 1.0)
    assert seen.steps_per_s == 0.0, "two steps at one moment"


def test_a_restore_is_no_speed() -> None:
    seen = Beats(Attempt(1, 2), 1, restored_step=356)
    seen.take({"0": rank(1)}, 1.0)
    seen.take({"0": rank(360)}, 2.0)
    assert seen.steps_per_s == 0.0
    seen.take({"0": rank(380)}, 3.0)
    assert seen.steps_per_s == pytest.approx(20.0)


def test_a_save_is_named_ahead_of_the_fastest_rank() -> None:
    seen = beats()
    for second in range(11):
        seen.take({"0": rank(1 + 10 * second), "1": rank(2 + 10 * second)}, float(second))
    assert seen.save_step() == 102 + 20
    assert seen.save_step(above=200) == 220
    slow = beats(1)
    slow.take({"0": rank(3)}, 1.0)
    assert slow.save_step() == 5


def test_loss_is_that_of_the_lowest_rank_that_gives_one() -> None:
    seen = beats()
    seen.take({"1": rank(1, loss=2.0), "0": rank(1, loss=float("nan"))}, 1.0)
    assert seen.newest("loss") == 2.0
    assert seen.newest("total") is None
    assert not seen.can_save
    seen.take({"1": rank(1, uses_due=True)}, 1.0)
    assert seen.can_save


@pytest.mark.parametrize("raw", [{"x": rank(1)}, {"0": {}}, {"0": rank("one")}])
def test_what_does_not_fit_raises(raw: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        beats().take(raw, 1.0)
