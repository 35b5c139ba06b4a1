"""Asking the gang's other agents whether they live, while the controller is silent.

A round dials every peer, says hello with term 0 (which claims nothing) and counts those that answer
with the attempt that we hold: one that holds a newer attempt has a controller that has replaced us.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from perdure.runtime.wire import Link


class Witnesses:
    """One round at a time; `begun_s` is when it began: all that it proves is true at that time."""

    def __init__(self) -> None:
        self.begun_s = 0.0
        self._asked: dict[Link, str] = {}
        self._alive: set[str] = set()

    def begin(
        self, peers: Iterable[tuple[str, str, int]], run: str, token: str, now_s: float
    ) -> list[Link]:
        """Forget the last round and dial anew. Returns the links to watch."""
        self.begun_s = now_s
        self._asked.clear()
        self._alive.clear()
        for node, host, port in peers:
            link = Link.dialling(host, port, token)
            link.send({"kind": "hello", "run": run, "term": 0})
            self._asked[link] = node
        return [link for link in self._asked if link.broken is None]

    def heard(self, link: Link, message: dict[str, Any], attempt: str) -> None:
        asked = self._asked.get(link)  # None: of an earlier round
        if asked and message["kind"] == "welcome" and message.get("attempt") == attempt:
            self._alive.add(asked)

    @property
    def asked(self) -> list[Link]:
        return list(self._asked)

    @property
    def alive(self) -> int:
        return len(self._alive)
