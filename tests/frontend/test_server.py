"""Listening: ports that are taken, addresses that are not ours, and room for as many clients as allowed."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket

import pytest

from holdfast.base.errors import Conflict
from holdfast.frontend.server import SPARE_FILES, _close_to_new, _emptied, allow_files, listen
from tests.patience import within


def test_a_taken_port_is_said_so_before_anything_starts() -> None:
    first = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    with pytest.raises(Conflict, match=f"127.0.0.1:{port}.*--http-port"):
        listen("127.0.0.1", port)
    first.close()
    listen("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host.invalid"])
def test_addresses_that_are_not_ours(host: str) -> None:
    with pytest.raises(Conflict, match="cannot listen"):
        listen(host, 0)


def test_six() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    listen("::1", 0).close()


def limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> list[tuple[int, int]]:
    put: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: put.append(pair))
    return put


def test_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    put = limits(monkeypatch, 1024, 1_000_000)
    allow_files(8192)
    assert put == [(8192 + SPARE_FILES, 1_000_000)]


@pytest.mark.parametrize(("soft", "hard"), [(1_000_000, 1_000_000), (-1, -1), (20_000, -1)])
def test_enough_is_left_alone(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
    put = limits(monkeypatch, soft, hard)
    allow_files(8192)
    assert put == []


def test_too_low_a_hard_limit_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    put = limits(monkeypatch, 1024, 4096)
    with caplog.at_level(logging.WARNING):
        allow_files(8192)
    assert put == [(4096, 4096)]
    assert "DYN_HTTP_MAX_CONNECTIONS=8192" in caplog.text


async def test_a_socket_that_leaves_takes_no_new_connection_and_loses_none() -> None:
    """Shared by SO_REUSEPORT, the kernel would reset what comes between the last accept and the close."""
    loop = asyncio.get_running_loop()
    leaving = listen("127.0.0.1", 0, reuse_port=True)
    leaving.listen(16)
    port = leaving.getsockname()[1]
    before = socket.create_connection(("127.0.0.1", port), timeout=5)
    _close_to_new(leaving)
    late = socket.socket()
    late.setblocking(False)
    arriving = loop.create_task(loop.sock_connect(late, ("127.0.0.1", port)))
    done, _ = await asyncio.wait([arriving], timeout=0.1)
    assert not done, "neither taken nor refused"
    staying = listen("127.0.0.1", port, reuse_port=True)
    staying.listen(16)
    (taken,) = _emptied(leaving)
    assert taken.getpeername() == before.getsockname(), "what was there is served"
    await asyncio.wait_for(arriving, within(10))
    found, _ = await asyncio.wait_for(loop.sock_accept(staying), within(5))
    assert found.getpeername() == late.getsockname(), "who came late has found the other one"
    for sock in (before, late, taken, found, staying):
        sock.close()
