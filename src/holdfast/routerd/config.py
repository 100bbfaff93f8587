"""Settings of the router process. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.base.settings import setting
from holdfast.health.config import SystemConfig
from holdfast.requests.config import RequestSettings
from holdfast.routing.knowledge_config import KnowledgeSettings
from holdfast.routing.policy import RouterMode
from holdfast.runtime.tls import WireTls


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `holdfast router` can be told. Times in seconds."""

    namespace: Annotated[str, setting("DYN_NAMESPACE", "Namespace whose workers are used.")] = "dynamo"
    component: Annotated[
        str, setting("DYN_COMPONENT", "Component name of this router; frontends ask the routers of one name.")
    ] = "router"
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
    advertise: Annotated[
        str,
        setting("DYN_ROUTER_ADVERTISE", "host:port (or host alone) that callers shall use instead of the bound one."),
    ] = ""
    """As for workers; see `runtime.advertise`."""
    secret: Annotated[
        str, setting("DYN_WIRE_SECRET", "Shared secret of frontends, routers and workers; empty: none.", secret=True)
    ] = ""
    insecure: Annotated[
        bool, setting("DYN_WIRE_INSECURE", "Listen off loopback without a secret; for isolated networks only.")
    ] = False
    instance_id: Annotated[
        str, setting("DYN_INSTANCE_ID", "Identity of this router, 16 hex digits; empty: drawn at start.")
    ] = ""
    discovery_backend: Annotated[
        str, setting("DYN_DISCOVERY_BACKEND", "Where workers are found: file (this machine) or mem (this process).")
    ] = "file"
    file_kv: Annotated[
        str, setting("DYN_FILE_KV", "Directory of the file discovery backend; empty: one per user under TMPDIR.")
    ] = ""
    tls: WireTls = WireTls()
    router_mode: Annotated[RouterMode, setting("DYN_ROUTER_MODE", "How a worker is chosen.")] = "kv"
    router_active_request_expiry: Annotated[
        float,
        setting(
            "DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS",
            "A lease taken with a request id ends after this, if nobody frees it.",
            gt=0,
        ),
    ] = 300.0
    router_graceful_shutdown_timeout: Annotated[
        float,
        setting(
            "DYN_ROUTER_GRACEFUL_SHUTDOWN_TIMEOUT_SECS",
            "On SIGTERM streams that run through this router get this long to finish; the rest goes on elsewhere.",
            ge=0,
        ),
    ] = 5.0
    router_request_limit: Annotated[
        int, setting("DYN_ROUTER_REQUEST_LIMIT", "Streams through this router at once; more are refused.", ge=1)
    ] = 4096
    freeze_after_secs: Annotated[
        float,
        setting("DYN_FREEZE_AFTER_SECS", "A worker that answers no ping for this long loses its streams.", gt=0),
    ] = 1.5
    hang_floor_secs: Annotated[
        float,
        setting("DYN_HANG_FLOOR_SECS", "A busy engine may stand still for this long before it counts as hung.", gt=0),
    ] = 5.0
    system: SystemConfig = SystemConfig()
    knowledge: KnowledgeSettings = KnowledgeSettings()
    requests: RequestSettings = RequestSettings()
