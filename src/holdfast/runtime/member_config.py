"""Settings that processes share: how they find each other, and where they listen.

Must never hold behaviour.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.base.settings import setting
from holdfast.runtime.tls import WireTls


class MemberSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Of every process that is part of a fleet."""

    discovery_backend: Annotated[
        str,
        setting(
            "DYN_DISCOVERY_BACKEND", "Where workers register and are found: file (this machine) or mem (this process)."
        ),
    ] = "file"
    file_kv: Annotated[
        str, setting("DYN_FILE_KV", "Directory of the file discovery backend; empty: one per user under TMPDIR.")
    ] = ""
    secret: Annotated[
        str, setting("DYN_WIRE_SECRET", "Shared secret of frontends, routers and workers; empty: none.", secret=True)
    ] = ""
    """Both sides of a connection must prove that they know it."""
    tls: WireTls = WireTls()
    """Encryption of the wire protocol."""


class ListenerSettings(MemberSettings, frozen=True, kw_only=True):
    """Of those that others connect to."""

    rpc_host: Annotated[
        str, setting("DYN_TCP_RPC_HOST", "Address that the wire protocol listens on.", flag="tcp-rpc-host")
    ] = "127.0.0.1"
    """Off loopback a shared secret, mTLS or ``insecure`` is needed."""
    rpc_port: Annotated[
        int,
        setting(
            "DYN_TCP_RPC_PORT", "Port of the wire protocol; 0 picks a free one.", flag="tcp-rpc-port", ge=0, le=65535
        ),
    ] = 0
    insecure: Annotated[
        bool, setting("DYN_WIRE_INSECURE", "Listen off loopback without a secret; for isolated networks only.")
    ] = False
    """Accepts callers from other machines without proof."""
    instance_id: Annotated[
        str, setting("DYN_INSTANCE_ID", "Identity of this process, 16 hex digits; empty: drawn at start.")
    ] = ""
    """A supervisor gives a slot the same id over restarts; each start has an epoch of its own."""
