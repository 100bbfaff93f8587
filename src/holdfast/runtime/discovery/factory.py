"""Opens the discovery backend that is asked for: argument, else environment, else ``file``.

``DYN_DISCOVERY_BACKEND`` names it, ``DYN_FILE_KV`` the directory of ``file``, ``DYN_FILE_KV_TTL`` its lease in
seconds. Must never start it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from holdfast.base.errors import InvalidRequest
from holdfast.runtime.discovery.contract import Discovery
from holdfast.runtime.discovery.file import FileDiscovery, FileSettings
from holdfast.runtime.discovery.judge import JudgeSettings
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub

BACKENDS = ("file", "mem")
PLANNED_BACKENDS = ("etcd", "kubernetes")
SHORTEST_TTL = 1.0

_HUB = MemHub()
"""Where the ``mem`` participants of this process meet unless they bring a hub of their own."""


def open_discovery(
    backend: str = "",
    *,
    root: str | Path = "",
    ttl: float = 0.0,
    hub: MemHub | None = None,
    environ: Mapping[str, str] | None = None,
) -> Discovery:
    """Return a discovery participant that has not been started.

    Args:
        backend: ``file``, ``mem``, or a URL ``file:///directory``; empty: ``DYN_DISCOVERY_BACKEND``, else ``file``.
        root: directory of ``file``; empty: ``DYN_FILE_KV``, else one per user in the temporary directory.
        ttl: lease in seconds, at least 1; 0: ``DYN_FILE_KV_TTL``, else 10.
        hub: where ``mem`` participants meet; None: one per process.
        environ: the environment to look into; None: of this process.

    Raises:
        InvalidRequest: an unknown backend, or a lease that is no number of at least a second.
    """
    env = os.environ if environ is None else environ
    chosen = backend or env.get("DYN_DISCOVERY_BACKEND", "") or "file"
    if chosen.startswith("file://"):
        chosen, root = "file", chosen.removeprefix("file://")
    if chosen == "mem":
        return MemDiscovery(hub or _HUB)
    if chosen == "file":
        directory = Path(root or env.get("DYN_FILE_KV", "") or default_root()).expanduser()
        return FileDiscovery(directory, _file_settings(ttl, env))
    planned = " (not in this version)" if chosen in PLANNED_BACKENDS else ""
    raise InvalidRequest(
        f"discovery backend {chosen!r}{planned} cannot be used; set DYN_DISCOVERY_BACKEND to one of: "
        + ", ".join(BACKENDS),
        param="DYN_DISCOVERY_BACKEND",
    )


def default_root() -> Path:
    """Return the directory of this user: ``$TMPDIR/dynamo_store_kv_<uid>``."""
    return Path(tempfile.gettempdir()) / f"dynamo_store_kv_{os.getuid()}"


def _file_settings(ttl: float, env: Mapping[str, str]) -> FileSettings:
    text = env.get("DYN_FILE_KV_TTL", "")
    try:
        seconds = ttl or float(text or 10.0)
    except ValueError:
        seconds = 0.0
    if not seconds >= SHORTEST_TTL:
        raise InvalidRequest(
            f"the lease DYN_FILE_KV_TTL is {text or ttl!r}; it must be a number of seconds, at least {SHORTEST_TTL:g}",
            param="DYN_FILE_KV_TTL",
        )
    settle = 1.5 * min(1.0, seconds / 4)
    return FileSettings(JudgeSettings(ttl=seconds, settle=settle))
