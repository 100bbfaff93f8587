"""Listening: ports that are taken, addresses that are not ours, and room for as many clients as allowed."""

from __future__ import annotations

import logging
import resource
import socket

import pytest

from holdfast.base.errors import Conflict
from holdfast.frontend.server import SPARE_FILES, allow_files, listen


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
