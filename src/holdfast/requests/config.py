"""Settings of the request lifecycle. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.base.settings import setting
from holdfast.routing.config import AdmissionSettings
from holdfast.routing.router_config import RouterSettings


class DisaggSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When prompts are computed by prefill workers, and how long that may take. Lengths in tokens, times in seconds."""

    enforce_disagg: Annotated[
        bool,
        setting(
            "DYN_ENFORCE_DISAGG",
            "Fail a request whose prompt no prefill worker can compute, instead of letting its decode worker do it.",
        ),
    ] = False
    max_local_prefill_length: Annotated[
        int,
        setting(
            "DYN_MAX_LOCAL_PREFILL_LENGTH",
            "Prompts that leave the decode worker no more than this to compute are not handed to prefill workers; 0: "
            "all are.",
            ge=0,
        ),
    ] = 0
    conditional_disagg_enabled: Annotated[
        bool,
        setting(
            "DYN_CONDITIONAL_DISAGG_ENABLED",
            "Let the decode worker compute prompts of which its cache holds much (needs router mode kv).",
            aliases=("DYN_ROUTER_CONDITIONAL_DISAGG_ENABLED",),
        ),
    ] = False
    conditional_disagg_eff_isl_threshold: Annotated[
        int,
        setting(
            "DYN_CONDITIONAL_DISAGG_EFF_ISL_THRESHOLD",
            "It does so when fewer than these are left to compute …",
            aliases=("DYN_ROUTER_CONDITIONAL_DISAGG_EFF_ISL_THRESHOLD",),
            ge=0,
        ),
    ] = 2048
    conditional_disagg_eff_isl_ratio_threshold: Annotated[
        float,
        setting(
            "DYN_CONDITIONAL_DISAGG_EFF_ISL_RATIO_THRESHOLD",
            "… and these are less than this share of the prompt.",
            aliases=("DYN_ROUTER_CONDITIONAL_DISAGG_EFF_ISL_RATIO_THRESHOLD",),
            ge=0,
        ),
    ] = 0.7
    prefill_timeout: Annotated[
        float,
        setting(
            "DYN_PREFILL_TIMEOUT_SECS",
            "From sending a prompt to a prefill worker to its hand-off; then another way is taken; 0: no deadline.",
            ge=0,
        ),
    ] = 120.0
    handoff_timeout: Annotated[
        float,
        setting(
            "DYN_HANDOFF_TIMEOUT_SECS",
            "From the hand-off to the first token of the decode worker; then it computes the prompt itself; 0: no "
            "deadline.",
            ge=0,
        ),
    ] = 30.0

    @property
    def conditional(self) -> bool:
        """Whether some prompts are computed where they are decoded although prefill workers are there."""
        return self.conditional_disagg_enabled or self.max_local_prefill_length > 0


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
    migration_trial_tokens: Annotated[
        int,
        setting(
            "DYN_MIGRATION_TRIAL_TOKENS",
            "A stream whose first worker died before it had brought so many tokens is tried alone on the next one.",
            ge=1,
        ),
    ] = 1
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
    disagg: DisaggSettings = DisaggSettings()
