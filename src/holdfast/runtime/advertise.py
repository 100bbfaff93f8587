"""The address under which callers find this worker, when that is not the one that it is bound to.

A worker that listens everywhere (``0.0.0.0``, ``::``) cannot publish that: on another machine it means that machine.
Published is the address of the interface that the default route uses, or else what this machine's name resolves to.

Must never publish an address that only this machine can reach without having been told to.
"""

from __future__ import annotations

import contextlib
import socket

from holdfast.base.settings import InvalidSetting
from holdfast.runtime.transport import is_loopback, join_address, split_address

WILDCARDS = frozenset({"", "0.0.0.0", "::"})
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses for documentation (RFC 5737, RFC 3849): behind the default route, and nobody's."""


def needs_finding(host: str, wanted: str) -> bool:
    """Whether callers shall use another address than the bound one."""
    return bool(wanted) or host in WILDCARDS


def published_address(bound: str, wanted: str) -> str:
    """Return the ``host:port`` that goes into discovery. May look up this machine's name, so it may block.

    Args:
        bound: ``host:port`` of the listener.
        wanted: what the operator says: ``host:port``, a host alone, or empty.

    Raises:
        InvalidSetting: nothing was said, the listener is bound everywhere, and no address can be found.
    """
    host, port = split_address(bound)
    if wanted:
        return wanted if _has_port(wanted) else join_address(wanted.strip("[]"), port)
    if host not in WILDCARDS:
        return bound
    family = socket.AF_INET6 if host == "::" else socket.AF_INET
    found = _of_default_route(family) or _of_own_name(family)
    if not found:
        raise InvalidSetting(
            f"The worker listens on {bound}, which callers on other machines cannot use, and no reachable address was "
            f"found: there is no default route, and the name {socket.gethostname()!r} stands for no address of this "
            "machine. Say under which address callers reach it with --advertise (DYN_WORKER_ADVERTISE), or listen on "
            "that address alone with --tcp-rpc-host."
        )
    return join_address(found, port)


def _has_port(text: str) -> bool:
    """Whether it is ``host:port``; a bare IPv6 address has colons too, and no port without brackets."""
    host, colon, port = text.rpartition(":")
    return bool(colon) and port.isdigit() and (":" not in host or host.endswith("]"))


def _of_default_route(family: socket.AddressFamily) -> str:
    """Return the address that packets to elsewhere would leave from; nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((_ELSEWHERE[family], 9))
        return _usable(probe.getsockname()[0])
    return ""


def _of_own_name(family: socket.AddressFamily) -> str:
    with contextlib.suppress(OSError):
        for found in socket.getaddrinfo(socket.gethostname(), None, family, socket.SOCK_STREAM):
            if address := _usable(str(found[4][0])):
                return address
    return ""


def _usable(address: str) -> str:
    return "" if address in WILDCARDS or is_loopback(address) else address
