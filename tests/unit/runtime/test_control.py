"""Requests to a living controller, over a socket that its own loop serves."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from perdure.runtime.wire import Link, Message

Script = Iterator[Callable[[Any, Any], bool]]


class Asker:
    """A client whose socket lies in the driver's watch."""

    def __init__(self, world: Any, token: str = "token") -> None:
        self.link = Link.dialling(*world.driver.address, token)
        self.got: list[Message] = []
        world.driver._watch.add(self.link, self.news)

    def news(self) -> None:
        self.link.flush()
        self.got += self.link.receive()

    def ask(self, **message: Any) -> None:
        self.link.send(message)

    def kinds(self) -> list[str]:
        return [message["kind"] for message in self.got]


def test_status_watch_and_stop(make_world: Any, until: Any) -> None:
    world = make_world()
    askers: list[Asker] = []

    def script() -> Script:
        yield until("running")
        asker = Asker(world)
        askers.append(asker)
        asker.ask(kind="status")
        asker.ask(kind="watch")
        yield lambda status, lines: asker.kinds()[:2] == ["status", "turn"]
        assert asker.got[0]["status"]["phase"] == "running"
        assert "launch_gang" in [line["kind"] for line in asker.got[1]["lines"]], "the recent past"
        asker.ask(kind="stop", by="perdure stop", exit_code=0)

    assert world.run(script()) == 0
    askers[0].news()
    last = [m for m in askers[0].got if m["kind"] == "turn"][-1]
    assert last["status"]["exit_code"] == 0, "who watches hears of the end"
    askers[0].link.close()


def test_a_request_that_does_not_fit_is_answered_in_words(make_world: Any, until: Any) -> None:
    world = make_world()

    def script() -> Script:
        yield until("running")
        asker = Asker(world)
        asker.ask(kind="sing")
        asker.ask(kind="stop", by="me")
        yield lambda status, lines: asker.kinds() == ["failed", "failed"]
        assert "no such request" in asker.got[0]["why"] and "exit_code" in asker.got[1]["why"]
        asker.link.close()
        world.agents[0].all_exit(exit_code=0)

    assert world.run(script()) == 0


def test_a_stranger_gets_nothing(make_world: Any, until: Any) -> None:
    world = make_world()

    def script() -> Script:
        yield until("running")
        stranger = Asker(world, token="guess")
        stranger.ask(kind="stop", by="a stranger", exit_code=1)
        yield lambda status, lines: stranger.link.broken is not None
        world.agents[0].all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert "stop_asked" not in world.kinds()


def test_secrets_that_a_controller_lacks_are_waited_for_in_words(
    make_world: Any, until: Any
) -> None:
    world = make_world()
    world.spec = replace(world.spec, secret_env=("KEY",))

    def script() -> Script:
        yield lambda status, lines: "KEY" in status["waiting_for"]
        assert "job" not in world.agents[0].kinds()
        asker = Asker(world)
        asker.ask(kind="secrets", secrets={"KEY": "s3cr3t", "OTHER": "x"})
        yield until("running")
        asker.link.close()
        world.agents[0].all_exit(exit_code=0)

    assert world.run(script()) == 0
    assert world.agents[0].secrets == {"KEY": "s3cr3t"}
