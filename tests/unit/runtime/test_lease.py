"""The lease's law, walked through by hand."""

from __future__ import annotations

import pytest

from perdure.runtime.lease import Lease, majority


def lease(**options: bool) -> Lease:
    return Lease(beat_s=1.0, fence_s=6.0, orphan_grace_s=180.0, **options)


def test_nothing_may_run_before_a_controller_answered() -> None:
    assert not lease().holds(1.0)


def test_it_is_counted_from_the_sending_of_the_beat() -> None:
    held = lease()
    held.answered(100.0)
    assert held.holds(105.9)
    assert not held.holds(106.0)
    held.answered(99.0)
    assert held.deadline_s() == 106.0, "an older answer does not shorten it"


def test_a_majority_prolongs_it_up_to_the_orphan_grace() -> None:
    held = lease()
    held.answered(100.0)
    held.witnessed(104.0)
    assert held.deadline_s() == 110.0
    held.witnessed(279.0)
    assert held.deadline_s() == 280.0
    held.answered(300.0)
    assert held.deadline_s() == 306.0


def test_a_witness_older_than_the_answer_adds_nothing() -> None:
    held = lease()
    held.answered(100.0)
    held.witnessed(99.0)
    assert held.deadline_s() == 106.0


def test_witnesses_are_asked_when_two_beats_are_missing() -> None:
    held = lease()
    assert not held.wants_witnesses(50.0)
    held.answered(100.0)
    assert not held.wants_witnesses(101.9)
    assert held.wants_witnesses(102.1)
    held.witnessed(102.1)
    assert not held.wants_witnesses(103.0)
    assert held.wants_witnesses(104.2)


def test_an_owned_agent_needs_no_lease_and_is_never_abandoned() -> None:
    held = lease(owned=True)
    assert held.holds(1e9)
    assert not held.wants_witnesses(1e9)
    assert not held.abandoned(1e9, 0.0)


def test_an_agent_without_a_controller_is_abandoned_in_the_end() -> None:
    held = lease()
    assert not held.abandoned(179.0, since_s=0.0)
    assert held.abandoned(181.0, since_s=0.0)
    held.answered(100.0)
    assert not held.abandoned(181.0, since_s=0.0)
    assert held.abandoned(281.0, since_s=0.0)


@pytest.mark.parametrize(
    ("alive", "gang", "most"),
    [(1, 1, False), (1, 2, False), (2, 2, True), (1, 3, False), (2, 3, True), (2, 4, False)],
)
def test_a_majority_is_more_than_half_and_never_oneself(alive: int, gang: int, most: bool) -> None:
    assert majority(alive, gang) is most
