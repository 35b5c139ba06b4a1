import socket
import time

import pytest

from perdure.runtime import wire
from perdure.runtime.errors import WireError
from perdure.runtime.wire import Link, Listener, Message


def pair(dial_token: str = "secret", listen_token: str = "secret") -> tuple[Link, Link]:
    ours, theirs = socket.socketpair()
    return Link(ours, dial_token, dialler=True), Link(theirs, listen_token, dialler=False)


def pump(*links: Link, turns: int = 20) -> dict[Link, list[Message]]:
    got: dict[Link, list[Message]] = {link: [] for link in links}
    for _ in range(turns):
        for link in links:
            if link.broken is None:
                link.flush()
                got[link] += link.receive()
    return got


def test_both_sides_prove_themselves_then_talk() -> None:
    dialler, listener = pair()
    dialler.send({"kind": "hello", "n": 1})
    listener.send({"kind": "welcome", "text": "é"})
    got = pump(dialler, listener)
    assert dialler.established and listener.established
    assert got[listener] == [{"kind": "hello", "n": 1}]
    assert got[dialler] == [{"kind": "welcome", "text": "é"}]
    dialler.close()
    listener.close()


@pytest.mark.parametrize("tokens", [("wrong", "secret"), ("secret", "wrong")])
def test_a_wrong_token_is_dropped_before_any_frame(tokens: tuple[str, str]) -> None:
    dialler, listener = pair(*tokens)
    dialler.send({"kind": "job", "secrets": {"KEY": "s3cr3t"}})
    got = pump(dialler, listener)
    assert listener.broken == "the peer does not know the run's token"
    assert dialler.broken and not dialler.established
    assert got == {dialler: [], listener: []}


def test_a_listener_that_does_not_know_the_token_gets_no_message() -> None:
    ours, theirs = socket.socketpair()
    dialler = Link(ours, "secret", dialler=True)
    dialler.send({"kind": "job", "secrets": {"KEY": "s3cr3t"}})
    theirs.sendall(b"n" * 32)
    pump(dialler)
    theirs.sendall(b"p" * 32)  # no proof at all
    pump(dialler)
    assert dialler.broken == "the peer does not know the run's token"
    seen = theirs.recv(1 << 16)
    assert len(seen) == 64 and b"s3cr3t" not in seen
    theirs.close()


def test_a_replayed_proof_is_worth_nothing() -> None:
    ours, theirs = socket.socketpair()
    listener = Link(theirs, "secret", dialler=False)
    nonce = ours.recv(32)
    ours.sendall(nonce + wire._proof("secret", b"listen", nonce, nonce))  # its own kind of proof
    pump(listener)
    assert listener.broken == "the peer does not know the run's token"
    ours.close()


def test_messages_before_the_end_are_delivered() -> None:
    dialler, listener = pair()
    pump(dialler, listener)
    dialler.send({"kind": "exited"})
    dialler.close()
    assert listener.receive() == [{"kind": "exited"}]
    assert listener.receive() == []
    assert listener.broken == "closed by the peer"


def test_frames_cut_anywhere_are_put_together() -> None:
    ours, theirs = socket.socketpair()
    listener = Link(theirs, "secret", dialler=False)
    nonce = ours.recv(32)
    own = b"o" * 32
    stream = own + wire._proof("secret", b"dial", nonce, own)
    stream += wire.encode_frame({"kind": "a"}) + wire.encode_frame({"kind": "b", "x": [1, 2]})
    got = []
    for at in range(len(stream)):
        ours.sendall(stream[at : at + 1])
        got += listener.receive()
    assert got == [{"kind": "a"}, {"kind": "b", "x": [1, 2]}]
    ours.close()
    listener.close()


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        ((1 << 30).to_bytes(4, "big"), "over the limit"),
        ((2).to_bytes(4, "big") + b"[]", "not a JSON object"),
        ((9).to_bytes(4, "big") + b'{"a": "b"', "not a JSON object"),
        ((2).to_bytes(4, "big") + b"{}", "not a JSON object"),
    ],
)
def test_nonsense_breaks_the_link_in_words(frame: bytes, why: str) -> None:
    dialler, listener = pair()
    pump(dialler, listener)
    dialler._out += frame
    dialler.flush()
    assert listener.receive() == []
    assert why in (listener.broken or "")
    dialler.close()


def test_a_peer_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "BUFFER_BYTES_MAX", 1 << 20)
    dialler, listener = pair()
    pump(dialler, listener)
    for _ in range(40):
        dialler.send({"kind": "note", "text": "x" * 100_000})
    assert dialler.broken == "the peer does not read what it is sent"
    listener.close()


def test_a_message_over_the_limit_is_refused_at_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "FRAME_BYTES_MAX", 100)
    with pytest.raises(WireError, match="over the limit"):
        wire.encode_frame({"kind": "note", "text": "x" * 101})


def test_a_large_message_crosses_small_socket_buffers() -> None:
    dialler, listener = pair()
    text = "é" * 1_000_000
    dialler.send({"kind": "note", "text": text})
    got = pump(dialler, listener, turns=200)
    assert got[listener] == [{"kind": "note", "text": text}]
    dialler.close()
    listener.close()


def test_an_unfinished_handshake_goes_stale() -> None:
    dialler, listener = pair()
    now_s = time.monotonic()
    assert not listener.stale(now_s)
    assert listener.stale(now_s + wire.HANDSHAKE_S + 1)
    pump(dialler, listener)
    assert not listener.stale(now_s + wire.HANDSHAKE_S + 1)
    dialler.close()
    listener.close()


def test_listener_and_dial_over_tcp() -> None:
    listener = Listener("secret")
    dialler = Link.dialling("127.0.0.1", listener.port, "secret")
    accepted = None
    while accepted is None:
        accepted = listener.accept()
    dialler.send({"kind": "status"})
    got = pump(dialler, accepted, turns=1000)
    assert got[accepted] == [{"kind": "status"}]
    for end in (dialler, accepted, listener):
        end.close()


def test_nobody_listens() -> None:
    listener = Listener("secret")
    listener.close()
    with pytest.raises(WireError, match="connection refused"):
        wire.dial("127.0.0.1", listener.port, "secret", 5.0)
    dialler = Link.dialling("127.0.0.1", listener.port, "secret")
    pump(dialler, turns=1000)
    assert dialler.refused


def test_dial_gives_up_on_a_peer_that_says_nothing() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(WireError, match="in time"):
        wire.dial("127.0.0.1", silent.getsockname()[1], "secret", 0.02)
    silent.close()
