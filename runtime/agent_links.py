"""An agent's connections: who is connected, who is obeyed, and what waits to be said.

Obedience: a `hello` with a term at least as high as any seen makes its link the obeyed one (`obey`).
What is said while nobody is obeyed waits, bounded, but for beats, which would be stale.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from perdure.runtime.wire import Link, Listener

_UNSAID_MAX = 200

Hear = Callable[[Link, dict[str, Any]], None]


class Watcher(Protocol):
    """The loop's selector."""

    def watch(self, thing: Any, handler: Callable[[], object], *, write: bool = False) -> None: ...
    def unwatch(self, fd: int) -> None: ...


class Links:
    def __init__(self, loop: Watcher, *, host: str, token: str, node: str, hear: Hear) -> None:
        self._loop, self._node, self._hear = loop, node, hear
        self._listener = Listener(token, host=host)
        self._open: set[Link] = set()
        self._unsaid: deque[dict[str, Any]] = deque(maxlen=_UNSAID_MAX)
        self.port = self._listener.port
        self.obeyed: Link | None = None
        self.term = 0
        loop.watch(self._listener, self._accept)

    def _accept(self) -> None:
        link = self._listener.accept()
        if link is not None:
            self.add(link, self._hear)

    def add(self, link: Link, hear: Hear) -> None:
        """Watch a link; what arrives on it goes to `hear`."""
        if link.broken is None:
            self._open.add(link)
            self._settle(link, link.fileno(), hear)

    def _readable(self, link: Link, fd: int, hear: Hear) -> None:
        link.flush()
        for message in link.receive():
            hear(link, message)
        self._settle(link, fd, hear)

    def _settle(self, link: Link, fd: int, hear: Hear) -> None:
        """Watch for what the link now waits for; forget it if it ended."""
        self._loop.unwatch(fd)
        if link.broken is None:
            self._loop.watch(link, lambda: self._readable(link, fd, hear), write=link.wants_write)
            return
        self._open.discard(link)
        if link is self.obeyed:
            self.obeyed = None

    def send(self, link: Link, **message: Any) -> None:
        if link.broken is None:
            fd = link.fileno()
            link.send(message)
            self._settle(link, fd, self._hear)

    def tell(self, **message: Any) -> None:
        """Say it to the controller, or keep it until there is one."""
        if self.obeyed is not None:
            self.send(self.obeyed, **message)
        elif message["kind"] != "beat":
            self._unsaid.append(message)

    def note(self, text: str) -> None:
        self.tell(kind="note", text=f"{self._node}: {text}")

    def obey(self, link: Link, term: int) -> None:
        """From now on `link` is the controller; an earlier one is hung up on."""
        old, self.obeyed, self.term = self.obeyed, link, term
        if old is not None and old is not link:
            self.drop([old])

    def say_unsaid(self) -> None:
        """What waited, but exits: those are said again in any case, and from the gang itself."""
        unsaid, self._unsaid = list(self._unsaid), deque(maxlen=_UNSAID_MAX)
        for message in unsaid:
            if message["kind"] in ("note", "failed", "ready"):
                self.tell(**message)

    def drop(self, links: Iterable[Link]) -> None:
        for link in list(links):
            if link.broken is None:
                fd = link.fileno()
                link.close()
                self._settle(link, fd, self._hear)

    def close(self) -> None:
        for link in self._open:
            link.flush()
            link.close()
        self._listener.close()
