"""The port on which the rendezvous store of the next attempt will be, bound before anyone asks.

The agent binds and listens; a launch names the port; the listening socket itself is handed to the
store's process. So there is no moment in which another program could take the port, and ranks may
connect before the store has begun to serve.
"""

from __future__ import annotations

import socket


class Rendezvous:
    def __init__(self, host: str) -> None:
        self._host = host
        self._sock = self._bind()

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        return socket.create_server((self._host, 0), family=family, backlog=4096)

    @property
    def port(self) -> int:
        return int(self._sock.getsockname()[1])

    def take(self) -> socket.socket:
        """The listening socket for this attempt; another is bound for the next."""
        taken, self._sock = self._sock, self._bind()
        return taken

    def close(self) -> None:
        self._sock.close()
