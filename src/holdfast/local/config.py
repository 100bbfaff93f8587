"""Settings of a local cluster. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from holdfast.base.settings import setting


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `holdfast serve` can be told beside the settings of its children. Times in seconds."""

    workers: Annotated[int, setting("DYN_SERVE_WORKERS", "Worker processes.", ge=1, le=64)] = 2
    prefill_workers: Annotated[
        int,
        setting(
            "DYN_SERVE_PREFILL_WORKERS",
            "Worker processes beside these that compute prompts only; the others are decode workers then.",
            ge=0,
            le=64,
        ),
    ] = 0
    """0: every worker does the whole of a request."""
    frontends: Annotated[
        int, setting("DYN_SERVE_FRONTENDS", "Frontend processes; see --frontend-ports.", ge=1, le=64)
    ] = 1
    frontend_ports: Annotated[
        Literal["auto", "shared", "successive"],
        setting(
            "DYN_SERVE_FRONTEND_PORTS",
            "Whether frontends share --http-port, each with a port of its own beside it for its metrics and health, or "
            "listen on successive ports from --http-port; auto: shared when there are several.",
        ),
    ] = "auto"
    start_timeout: Annotated[
        float, setting("DYN_SERVE_START_TIMEOUT_SECS", "Give up when the cluster is not ready within this.", gt=0)
    ] = 180.0
    stop_grace: Annotated[
        float, setting("DYN_SERVE_STOP_GRACE_SECS", "Between SIGTERM and SIGKILL of a child that is stopped.", ge=0)
    ] = 60.0
    serve_system_port: Annotated[
        int,
        setting(
            "DYN_SERVE_SYSTEM_PORT",
            "Port of the supervisor's own status server (DYN_SYSTEM_PORT is for its workers, which count up from it); "
            "0 picks a free one, negative: none.",
            le=65535,
        ),
    ] = 0
    """Found in discovery, and in the line of --json."""
    restart_intensity: Annotated[
        int,
        setting("DYN_SERVE_RESTART_INTENSITY", "Crashes of one slot within the window before it is given up.", ge=0),
    ] = 5
    restart_window: Annotated[
        float, setting("DYN_SERVE_RESTART_WINDOW_SECS", "Window in which the crashes of one slot are counted.", gt=0)
    ] = 30.0
