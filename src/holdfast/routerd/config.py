"""Settings of the router process. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated

from holdfast.base.settings import setting
from holdfast.health.config import SystemConfig
from holdfast.requests.config import RequestSettings
from holdfast.routing.knowledge_config import KnowledgeSettings
from holdfast.routing.policy import RouterMode
from holdfast.runtime.member_config import ListenerSettings


class RouterConfig(ListenerSettings, frozen=True, kw_only=True):
    """Everything that `holdfast router` can be told. Times in seconds."""

    namespace: Annotated[str, setting("DYN_NAMESPACE", "Namespace whose workers are used.")] = "dynamo"
    component: Annotated[
        str, setting("DYN_COMPONENT", "Component name of this router; frontends ask the routers of one name.")
    ] = "router"
    advertise: Annotated[
        str,
        setting("DYN_ROUTER_ADVERTISE", "host:port (or host alone) that callers shall use instead of the bound one."),
    ] = ""
    """As for workers; see `runtime.advertise`."""
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
