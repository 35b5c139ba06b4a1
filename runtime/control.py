"""What others may ask of a living controller: its status, a save, a stop, and to watch.

The same wire and token as the agents'. Anyone who knows the token may ask; nothing asked here ever
blocks the loop. A watcher gets each turn's status and journal lines; one that does not read is dropped
by its link's bound, never waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perdure.runtime.watch import Watch
from perdure.runtime.wire import Link, Listener, Message

RECENT_LINES = 200  # what a new watcher is shown of the past


@dataclass(frozen=True, slots=True, kw_only=True)
class Asks:
    """What the driver does for a request."""

    status: Callable[[], Message]
    stop: Callable[[str, int, bool], None]  # by, exit code, at once
    save: Callable[[str], None]  # by
    secrets: Callable[[dict[str, str]], None]


class ControlServer:
    def __init__(self, listener: Listener, watch: Watch, asks: Asks) -> None:
        self._listener, self._watch, self._asks = listener, watch, asks
        self._links: list[Link] = []
        self._watchers: list[Link] = []
        self._recent: list[Message] = []
        watch.add(listener, self._accept)

    def publish(self, status: Message, lines: list[Message]) -> None:
        self._recent = [*self._recent, *lines][-RECENT_LINES:]
        self._watchers = [link for link in self._watchers if link.broken is None]
        for link in self._watchers:
            link.send({"kind": "turn", "status": status, "lines": lines})

    @property
    def watched(self) -> bool:
        return bool(self._watchers)

    def sweep(self, now_s: float) -> None:
        """Drop who does not finish the handshake (`now_s`: monotonic)."""
        for link in self._links:
            if link.stale(now_s):
                link.close()
        self._links = [link for link in self._links if link.broken is None]

    def flushed(self) -> bool:
        return not any(link.wants_write for link in self._links)

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._listener.close()

    def _accept(self) -> None:
        while (link := self._listener.accept()) is not None:
            self._links.append(link)
            self._watch.add(link, functools.partial(self._news, link))

    def _news(self, link: Link) -> None:
        link.flush()
        for message in link.receive():
            try:
                self._answer(link, message)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                link.send({"kind": "failed", "why": f"{message['kind']!r} does not fit: {error}"})

    def _answer(self, link: Link, message: dict[str, Any]) -> None:
        asks, kind = self._asks, message["kind"]
        if kind == "status":
            link.send({"kind": "status", "status": asks.status()})
            return
        if kind == "watch":
            self._watchers.append(link)
            link.send({"kind": "turn", "status": asks.status(), "lines": self._recent})
            return
        if kind == "stop":
            asks.stop(str(message["by"]), int(message["exit_code"]), bool(message.get("at_once")))
        elif kind == "save":
            asks.save(str(message["by"]))
        elif kind == "secrets":
            asks.secrets({str(k): str(v) for k, v in message["secrets"].items()})
        else:
            raise ValueError("no such request")
        link.send({"kind": "ok"})
