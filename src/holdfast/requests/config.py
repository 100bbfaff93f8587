"""Settings of the request lifecycle. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.base.settings import setting
from holdfast.routing.config import AdmissionSettings
from holdfast.routing.router_config import RouterSettings


class RequestSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Deadlines, migration and waiting. Times in seconds; 0 switches a deadline off where it says so."""

    migration_limit: Annotated[
        int, setting("DYN_MIGRATION_LIMIT", "Moves of one stream because of worker or network faults; 0 switches off.")
    ] = 3
    migration_max_seq_len: Annotated[
        int, setting("DYN_MIGRATION_MAX_SEQ_LEN", "Streams of more tokens than this are not moved; 0: no bound.")
    ] = 0
    migration_wait_secs: Annotated[
        float, setting("DYN_MIGRATION_WAIT_SECS", "How long a request waits for a worker when none is left.")
    ] = 30.0
    migration_max_waiting: Annotated[
        int, setting("DYN_MIGRATION_MAX_WAITING", "Requests that may wait for a replacement worker at once.")
    ] = 1024
    accept_hedge_timeout: Annotated[
        float,
        setting("DYN_ACCEPT_HEDGE_TIMEOUT", "Without the worker's accept for this long, another usable one is tried."),
    ] = 0.5
    accept_timeout: Annotated[
        float, setting("DYN_ACCEPT_TIMEOUT", "Without the only worker's accept for this long, the attempt has failed.")
    ] = 10.0
    first_token_timeout: Annotated[
        float, setting("DYN_FIRST_TOKEN_TIMEOUT", "From accept to the first token; the attempt fails; 0: no deadline.")
    ] = 600.0
    inter_token_timeout: Annotated[
        float, setting("DYN_INTER_TOKEN_TIMEOUT", "Between two tokens; the attempt fails; 0: no deadline.")
    ] = 120.0
    request_timeout: Annotated[
        float, setting("DYN_REQUEST_TIMEOUT", "From arrival to the end; the request fails; 0: no deadline.")
    ] = 3600.0
    client_stall_timeout: Annotated[
        float, setting("DYN_CLIENT_STALL_TIMEOUT", "A client that takes no byte for this long is cancelled.")
    ] = 60.0
    admission: AdmissionSettings = AdmissionSettings()
    router: RouterSettings = RouterSettings()
