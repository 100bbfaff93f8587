"""Settings of health: the status server of every process, and how a worker tests itself.

Must never hold behaviour.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from holdfast.base.settings import setting

Status = Literal["ready", "notready"]


class SystemConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The status server; a settings group of every process. Times in seconds."""

    system_host: Annotated[str, setting("DYN_SYSTEM_HOST", "Address of the status server.")] = "127.0.0.1"
    """Loopback unless told otherwise; Kubernetes probes need 0.0.0.0 here."""
    system_port: Annotated[
        int, setting("DYN_SYSTEM_PORT", "Port of the status server; 0 picks a free one, negative: none.", le=65535)
    ] = -1
    """A taken port is a start-up failure."""
    system_health_path: Annotated[
        str, setting("DYN_SYSTEM_HEALTH_PATH", "Path of readiness: 200 or 503.", pattern="^/")
    ] = "/health"
    """Can work be sent here now?"""
    system_live_path: Annotated[str, setting("DYN_SYSTEM_LIVE_PATH", "Path of liveness: 200 or 503.", pattern="^/")] = (
        "/live"
    )
    """Does the process still run its event loop?"""
    system_starting_health_status: Annotated[
        Status,
        setting(
            "DYN_SYSTEM_STARTING_HEALTH_STATUS", "What readiness says before any endpoint is served: ready or notready."
        ),
    ] = "notready"
    """Overruled by listed endpoints and by holds."""
    system_use_endpoint_health_status: Annotated[
        tuple[str, ...],
        setting(
            "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS",
            "Ready when all of these endpoints are, whatever else is served; a JSON list or separated by commas.",
        ),
    ] = ()
    """Empty: every endpoint that can be probed counts."""
    system_live_timeout: Annotated[
        float,
        setting(
            "DYN_SYSTEM_LIVE_TIMEOUT_SECS", "Liveness fails when the event loop has not run for longer than this.", gt=0
        ),
    ] = 60.0
    """Generous: whoever fails it is killed. Does not count while the process starts."""
    system_token: Annotated[
        str,
        setting(
            "DYN_SYSTEM_TOKEN",
            "Bearer token that control routes (/engine/…) ask for; needed off loopback.",
            secret=True,
        ),
    ] = ""
    """Empty: control routes serve this machine only."""


class CanaryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker tests its own engine. Times in seconds."""

    health_check_enabled: Annotated[
        bool,
        setting("DYN_HEALTH_CHECK_ENABLED", "Send a tiny request through the real path whenever the worker is idle."),
    ] = False
    """The probe at start-up, and those that bring a worker back, are sent whatever this says."""
    canary_wait_time: Annotated[
        float, setting("DYN_CANARY_WAIT_TIME", "Seconds without a successful step before a canary.", gt=0)
    ] = 10.0
    """Real traffic that succeeds resets the clock."""
    health_check_request_timeout: Annotated[
        float, setting("DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "Seconds that one canary may take.", gt=0)
    ] = 3.0
    """From connecting to the last token."""
    health_check_busy_stall: Annotated[
        float,
        setting("DYN_HEALTH_CHECK_BUSY_STALL", "A busy engine without progress for this long is not ready.", gt=0),
    ] = 60.0
    """Raised by itself while the engine announces longer silent steps; frontends move streams much earlier."""
    health_check_failures: Annotated[
        int, setting("DYN_HEALTH_CHECK_FAILURES", "Consecutive failed canaries that make an endpoint not ready.", ge=1)
    ] = 2
    """One slow answer is no verdict."""
    health_check_successes: Annotated[
        int, setting("DYN_HEALTH_CHECK_SUCCESSES", "Consecutive good canaries that make it ready again.", ge=1)
    ] = 1
    """A token through the real path proves the path."""
    health_check_payload: Annotated[
        str, setting("DYN_HEALTH_CHECK_PAYLOAD", "Canary request as a JSON object, or @file; empty: the engine's own.")
    ] = ""
    """A value that cannot be used is reported and ignored."""
    engine_health_check_interval: Annotated[
        float, setting("DYN_ENGINE_HEALTH_CHECK_INTERVAL", "How often the engine's own check is asked.", gt=0)
    ] = 0.5
    """Together with the pongs it bounds how long a dead engine gets work: one second."""
    engine_health_check_timeout: Annotated[
        float, setting("DYN_ENGINE_HEALTH_CHECK_TIMEOUT", "An engine's check that takes longer counts as death.", gt=0)
    ] = 30.0
    """For engines whose check crosses a process boundary."""
