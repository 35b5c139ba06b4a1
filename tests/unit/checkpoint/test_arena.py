"""Memory that outlives a rank, and the frames that carry it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator

import pytest

from perdure.checkpoint.arena import PAGE, Arena, make_memfd
from perdure.checkpoint.frames import Channel, ChannelClosed, peer_is_this_user


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    a, b = socket.socketpair()
    with a, b:
        yield Channel(a), Channel(b)


def test_what_one_side_writes_the_other_reads(pair: tuple[Channel, Channel]) -> None:
    fd = make_memfd("test", 3 * PAGE)
    pair[0].send({"kind": "arena", "arena": 7}, [fd])
    received = pair[1].receive(1)
    assert received is not None
    message, fds = received
    assert message["arena"] == 7
    here, there = Arena(fd, 3 * PAGE), Arena(fds[0], 3 * PAGE)
    here.map[PAGE : PAGE + 5] = b"hello"
    assert there.map[PAGE : PAGE + 5] == b"hello"


def test_nobody_can_shrink_an_arena_under_another_process() -> None:
    fd = make_memfd("test", PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    os.close(fd)


def test_an_arena_of_nothing_is_a_page() -> None:
    assert len(Arena(make_memfd("test", 0), 0).map) == PAGE


def test_populating_maps_every_page_and_changes_no_byte() -> None:
    arena = Arena(make_memfd("test", 64 * PAGE), 64 * PAGE)
    assert not arena.populated()
    arena.map[:4] = b"kept"
    arena.populate()
    assert arena.populated(10)
    assert arena.map[:4] == b"kept"


def test_frames_keep_their_borders_and_their_descriptors(pair: tuple[Channel, Channel]) -> None:
    fds = [make_memfd("one", PAGE), make_memfd("two", PAGE)]
    pair[0].send({"kind": "a"})
    pair[0].send({"kind": "b"}, fds[:1])
    pair[0].send({"kind": "c", "text": "x" * 100_000}, fds[1:])
    counts = []
    for _ in range(3):
        received = pair[1].receive(1)
        assert received is not None
        counts.append((received[0]["kind"], len(received[1])))
        for fd in received[1]:
            os.close(fd)
    for fd in fds:
        os.close(fd)
    assert counts == [("a", 0), ("b", 1), ("c", 1)]


def test_looking_does_not_wait(pair: tuple[Channel, Channel]) -> None:
    assert pair[0].receive(0) is None


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",  # a length that no frame has
        b"\x00\x00\x00\x02{]",  # no JSON
        b"\x00\x00\x00\x02[]",  # no object
        b'\x00\x00\x00\x13{"kind":"a","fds":1',  # cut short: then the end
        b'\x00\x00\x00\x14{"kind":"a","fds":1}',  # announces a descriptor that never came
    ],
)
def test_what_is_no_frame_closes_the_channel(sent: bytes) -> None:
    a, b = socket.socketpair()
    a.sendall(sent)
    a.close()
    with b, pytest.raises(ChannelClosed):
        Channel(b).receive(1)


def test_a_channel_whose_other_end_is_gone(pair: tuple[Channel, Channel]) -> None:
    pair[1].close()
    with pytest.raises(ChannelClosed):
        pair[0].receive(1)
    with pytest.raises(ChannelClosed):
        pair[0].send({"kind": "a"})


def test_only_the_same_user_may_connect() -> None:
    a, b = socket.socketpair()
    with a, b:
        assert peer_is_this_user(a, os.getuid())
        assert not peer_is_this_user(a, os.getuid() + 1)
