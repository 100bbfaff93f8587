"""Ports of this machine: is one free, and if not, which process has it.

Must never keep a port; between the check and its use somebody else may take it, and then the process that
binds it says so.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from holdfast.base.errors import Conflict

_LISTEN = "0A"  # connection state in /proc/net/tcp
_BACKLOG = 2048


class PortTaken(Conflict):
    """The port is in use; the message names the process that has it, where that can be seen."""

    code = "port_taken"


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that was free a moment ago."""
    with _socket(host) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def claim_port(host: str, port: int) -> int:
    """Return ``port`` when it is free (any free one for 0).

    Raises:
        PortTaken: naming the port, its owner and the ways out.
    """
    if port == 0:
        return free_port(host)
    with _socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise Conflict(f"{host}:{port} cannot be used: {error.strerror}.", host=host, port=port) from error
            owner = owner_of(port)
            by = f" by {owner}" if owner else ", by a process that this user cannot see"
            raise PortTaken(
                f"Port {port} on {host} is taken{by}. Stop it, or choose another port with "
                f"--http-port (DYN_HTTP_PORT); 0 picks a free one.",
                host=host,
                port=port,
            ) from error
    return port


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket that several processes can inherit and accept from.

    As long as one process holds it no connection is refused: those that come while nobody accepts wait in its queue.

    Raises:
        PortTaken: as `claim_port`.
    """
    claim_port(host, port)
    listener = _socket(host)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise Conflict(f"{host}:{port} cannot be used: {error.strerror}.", host=host, port=port) from error
    listener.setblocking(False)
    return listener


def owner_of(port: int) -> str:
    """Return ``pid 123 (command line)`` of the process that listens on a TCP port; empty when unknown."""
    inodes = _listening_inodes(port)
    if not inodes:
        return ""
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and _holds(directory, inodes):
            return f"pid {directory.name} ({_command(directory)})"
    return ""


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            columns = row.split()
            if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{columns[9]}]")
    return found


def _holds(process: Path, inodes: set[str]) -> bool:
    try:
        return any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir())  # noqa: PTH115  not a path
    except OSError:
        return False


def _command(process: Path) -> str:
    try:
        return process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()[:120]
    except OSError:
        return "?"
