"""Ports: a taken one is reported with its owner."""

from __future__ import annotations

import os
import socket

import pytest

from holdfast.local.ports import PortTaken, claim_port, free_port


def test_a_free_port_is_free() -> None:
    port = free_port()
    assert claim_port("127.0.0.1", port) == port
    assert claim_port("127.0.0.1", 0) > 0


def test_a_taken_port_names_who_has_it_and_the_way_out() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken) as caught:
            claim_port("127.0.0.1", port)
    assert f"pid {os.getpid()} (" in caught.value.message
    assert "--http-port" in caught.value.message
