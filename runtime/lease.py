"""How long an agent may let its ranks train without a word of the controller. Pure: time comes in.

The lease is counted from the *sending* of the last beat that was answered: the controller had it at
that moment or later, so it cannot have given this node up before `takeover_s` after it, and
`fence_s` < `takeover_s`. With a majority of the gang's agents at hand, this one included, the node
trains on: whoever is cut off together with most of the gang is the gang. That too ends
`orphan_grace_s` after the controller's last word.

A gang of one node has no witness but itself, which is none; the store as witness is not built yet, so
such a gang ends at `fence_s`. An owned agent (a local `run`) has no fence: its controller is its
launcher, and the end of that is seen by the warden at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Lease:
    beat_s: float
    fence_s: float
    orphan_grace_s: float
    owned: bool = False
    answered_s: float | None = None  # when the last answered beat was sent
    witnessed_s: float | None = None  # when the last successful round of questions began

    def answered(self, sent_s: float) -> None:
        if self.answered_s is None or sent_s > self.answered_s:
            self.answered_s = sent_s

    def witnessed(self, asked_s: float) -> None:
        self.witnessed_s = asked_s

    def deadline_s(self) -> float | None:
        """When ranks must be gone; None: never. Before the first answer it has passed already."""
        if self.owned:
            return None
        if self.answered_s is None:
            return 0.0
        deadline = self.answered_s + self.fence_s
        if self.witnessed_s is not None and self.witnessed_s > self.answered_s:
            grace = self.answered_s + self.orphan_grace_s
            deadline = max(deadline, min(self.witnessed_s + self.fence_s, grace))
        return deadline

    def holds(self, now_s: float) -> bool:
        deadline = self.deadline_s()
        return deadline is None or now_s < deadline

    def wants_witnesses(self, now_s: float) -> bool:
        """The controller is late: time to ask the gang, often enough to renew before the deadline."""
        if self.owned or self.answered_s is None:
            return False
        heard_s = max(self.answered_s, self.witnessed_s or 0.0)
        return now_s - heard_s > 2 * self.beat_s

    def abandoned(self, now_s: float, since_s: float) -> bool:
        """No controller for so long that none will come. `since_s`: when this agent started."""
        last_s = since_s if self.answered_s is None else self.answered_s
        return not self.owned and now_s - last_s > self.orphan_grace_s


def majority(alive: int, gang: int) -> bool:
    """`alive` counts this node. A gang of one is no majority: it would be its own witness."""
    return gang > 1 and 2 * alive > gang
