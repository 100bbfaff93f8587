"""Settings of the frontend process. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated, Literal

from holdfast.base.limits import ACTIVE_REQUESTS
from holdfast.base.settings import setting
from holdfast.frontend.https import HttpTls
from holdfast.health.config import SystemConfig
from holdfast.requests.config import RequestSettings
from holdfast.routing.knowledge_config import KnowledgeSettings
from holdfast.routing.policy import RouterMode
from holdfast.runtime.member_config import MemberSettings
from holdfast.telemetry.metric import MetricSettings
from holdfast.telemetry.spans import TraceSettings


class FrontendConfig(MemberSettings, frozen=True, kw_only=True):
    """Everything that `holdfast frontend` can be told. Times in seconds unless the name says otherwise."""

    http_host: Annotated[str, setting("DYN_HTTP_HOST", "Address that the HTTP API binds to.")] = "127.0.0.1"
    http_port: Annotated[int, setting("DYN_HTTP_PORT", "Port of the HTTP API; 0 picks a free one.", ge=0, le=65535)] = (
        8000
    )
    namespace: Annotated[str, setting("DYN_NAMESPACE", "Namespace whose workers are used.")] = "dynamo"
    https: HttpTls = HttpTls()
    """Encryption of the HTTP API."""
    router_mode: Annotated[RouterMode, setting("DYN_ROUTER_MODE", "How a worker is chosen.")] = "round-robin"
    router_component: Annotated[
        str,
        setting(
            "DYN_ROUTER_COMPONENT",
            "Ask the stand-alone routers of this component (holdfast router: router) where each request should go; the "
            "router mode decides when none answers; empty: ask nobody.",
        ),
    ] = ""
    router_ask_timeout_ms: Annotated[
        float,
        setting("DYN_ROUTER_ASK_TIMEOUT_MS", "A request waits for a router's answer for this long at most.", gt=0),
    ] = 50.0
    http_body_limit_mb: Annotated[
        int, setting("DYN_HTTP_BODY_LIMIT_MB", "Largest request body in MiB.", ge=1, le=1024)
    ] = 192
    http_max_connections: Annotated[
        int, setting("DYN_HTTP_MAX_CONNECTIONS", "Client connections at once; more are answered 503 and closed.", ge=1)
    ] = 8192
    http_head_timeout: Annotated[
        float, setting("DYN_HTTP_HEAD_TIMEOUT_SECS", "A connection must bring a whole request head within this.", gt=0)
    ] = 20.0
    http_body_timeout: Annotated[
        float, setting("DYN_HTTP_BODY_TIMEOUT_SECS", "A request body must not pause for longer than this.", gt=0)
    ] = 30.0
    http_keep_alive: Annotated[
        float,
        setting("DYN_HTTP_KEEP_ALIVE_SECS", "Idle connections are kept for this; above a balancer's own bound.", gt=0),
    ] = 75.0
    http_sse_keep_alive_interval_ms: Annotated[
        int,
        setting("DYN_HTTP_SSE_KEEP_ALIVE_INTERVAL_MS", "A silent stream gets a comment this often; 0: never.", ge=0),
    ] = 15_000
    http_graceful_shutdown_timeout_secs: Annotated[
        float,
        setting("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "On SIGTERM running streams get this long to finish.", ge=0),
    ] = 5.0
    http_drain_notice: Annotated[
        float,
        setting(
            "DYN_HTTP_DRAIN_NOTICE_SECS",
            "On SIGTERM everything is served as before for this long while /health says 503 already, so that balancers "
            "can look away first; the grace begins afterwards.",
            ge=0,
        ),
    ] = 0.0
    http_drain_keep_alive: Annotated[
        float,
        setting(
            "DYN_HTTP_DRAIN_KEEP_ALIVE_SECS",
            "On SIGTERM requests on connections that clients hold already are still served for this long, half of the "
            "grace at most; new connections are turned away at once.",
            ge=0,
        ),
    ] = 1.0
    http_reuse_port: Annotated[
        bool,
        setting("DYN_HTTP_REUSE_PORT", "Share the port with other frontends of this machine (SO_REUSEPORT)."),
    ] = False
    http_listen_fd: Annotated[
        int,
        setting(
            "DYN_HTTP_LISTEN_FD",
            "Number of an inherited listening socket to serve beside the port, as 'holdfast serve' sets it; -1: none.",
            ge=-1,
        ),
    ] = -1
    api_keys_file: Annotated[
        str, setting("DYN_API_KEYS_FILE", "File of API keys, one per line, mode 0600; empty: no keys are asked for.")
    ] = ""
    trust_client_priority: Annotated[
        bool, setting("DYN_TRUST_CLIENT_PRIORITY", "Whether clients may set x-dynamo-request-priority.")
    ] = True
    tool_call_parser: Annotated[
        Literal["auto", "none", "hermes", "llama3_json", "mistral"],
        setting("DYN_TOOL_CALL_PARSER", "Format of tool calls: auto (by template), one of these, or none."),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "none"],
        setting("DYN_REASONING_PARSER", "Whether thinking in tags is split off: auto (by template) or none."),
    ] = "auto"
    freeze_after_secs: Annotated[
        float,
        setting("DYN_FREEZE_AFTER_SECS", "A worker that answers no ping for this long loses its streams.", gt=0),
    ] = 1.5
    hang_floor_secs: Annotated[
        float,
        setting("DYN_HANG_FLOOR_SECS", "A busy engine may stand still for this long before it counts as hung.", gt=0),
    ] = 5.0
    inhibited_duration_secs: Annotated[
        float,
        setting(
            "DYN_RUNTIME_INHIBITED_DURATION_SECS",
            "After a failed request a worker gets no new work for this long.",
            aliases=("DYN_INHIBITED_DURATION_SECS",),
            ge=0,
        ),
    ] = 5.0
    http_max_requests: Annotated[
        int, setting("DYN_HTTP_MAX_REQUESTS", "Requests in hand at once; more are answered with an error.", ge=1)
    ] = ACTIVE_REQUESTS
    http_overload_status_code: Annotated[
        int,
        setting(
            "DYN_HTTP_OVERLOAD_STATUS_CODE", "HTTP status of requests turned away for lack of room.", ge=400, le=599
        ),
    ] = 503
    disable_admin_api: Annotated[
        bool, setting("DYN_DISABLE_FRONTEND_ADMIN_API", "Do not offer routes that change something (/busy_threshold).")
    ] = False
    system: SystemConfig = SystemConfig()
    knowledge: KnowledgeSettings = KnowledgeSettings()
    """What is known of the workers' KV caches, and from where."""
    requests: RequestSettings = RequestSettings()
    explain_requests: Annotated[
        int,
        setting("DYN_EXPLAIN_REQUESTS", "Finished requests that `holdfast explain` can tell of; 0: none.", ge=0),
    ] = 1024
    metrics: MetricSettings = MetricSettings()
    traces: TraceSettings = TraceSettings()
