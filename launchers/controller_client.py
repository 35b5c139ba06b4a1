"""Asking a living controller: one authenticated connection, one question at a time, each bounded.

Used by the command line and by `Job`. A controller may be replaced while it is asked; that is a
WireError here, and the caller reads the record again and dials the new one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from perdure.launchers.records import RunRecord, read
from perdure.runtime.errors import RunProblem, WireError
from perdure.runtime.wire import dial

Turn = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]
SILENT_S = 10.0  # a controller publishes a turn four times a second; one that hangs is given up


class ControllerClient:
    """Raises WireError from every method when the controller is gone or too slow."""

    def __init__(self, host: str, port: int, token: str, timeout_s: float = 5.0) -> None:
        self._timeout_s = timeout_s
        self._peer = dial(host, port, token, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def status(self) -> dict[str, Any]:
        answer = self._ask({"kind": "status"}, "status")
        status = answer["status"]
        return dict(status)

    def stop(self, *, by: str, exit_code: int, at_once: bool = False) -> None:
        self._ask({"kind": "stop", "by": by, "exit_code": exit_code, "at_once": at_once}, "ok")

    def save(self, *, by: str) -> None:
        self._ask({"kind": "save", "by": by}, "ok")

    def give_secrets(self, values: Mapping[str, str]) -> None:
        self._ask({"kind": "secrets", "secrets": dict(values)}, "ok")

    def watch(self) -> Iterator[Turn]:
        """(status, new lines) for each turn, the recent lines first; about one a second at rest."""
        self._peer.send({"kind": "watch"}, timeout_s=self._timeout_s)
        heard_s = time.monotonic()
        status: Mapping[str, Any] = {}
        while True:
            message = self._peer.receive(1.0)
            if message is None:
                if time.monotonic() - heard_s > SILENT_S:
                    raise WireError(
                        f"the controller has been silent for {SILENT_S:.0f} s",
                        hint="is its machine reachable?",
                    )
                yield status, ()
                continue
            heard_s = time.monotonic()
            if message["kind"] == "turn":
                status = message["status"]
                yield status, message["lines"]

    def close(self) -> None:
        self._peer.close()

    def _ask(self, request: dict[str, Any], answer: str) -> dict[str, Any]:
        self._peer.send(request, timeout_s=self._timeout_s)
        end_s = time.monotonic() + self._timeout_s
        while (message := self._peer.receive(end_s - time.monotonic())) is not None:
            if message["kind"] == answer:
                return message
            if message["kind"] == "failed":
                raise RunProblem(
                    f"the controller refused to {request['kind']}: {message.get('why')}",
                    hint="is this perdure of the same version as the run's?",
                )
        raise WireError(
            f"the controller gave no answer to {request['kind']!r} within {self._timeout_s:g} s",
            hint="is its machine overloaded or unreachable?",
        )


def connect(record: RunRecord, timeout_s: float = 5.0) -> ControllerClient:
    """The run's controller as its newest record names it. Raises WireError when none answers."""
    newest = read(record.run) or record
    return ControllerClient(newest.host, newest.port, newest.token, timeout_s)
