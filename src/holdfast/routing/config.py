"""Settings of admission and of the queue in front of it. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from holdfast.base.settings import setting


class AdmissionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When requests are turned away for lack of room, and whether they may wait for it. Times in seconds."""

    active_decode_blocks_threshold: Annotated[
        float | None,
        setting(
            "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
            "A worker is saturated over this share of its KV blocks; not set: not checked.",
            ge=0,
            le=1,
        ),
    ] = None
    active_prefill_tokens_threshold: Annotated[
        int | None,
        setting(
            "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
            "A worker is saturated over this many prompt tokens still to compute; not set: not checked.",
            ge=0,
        ),
    ] = None
    active_prefill_tokens_threshold_frac: Annotated[
        float | None,
        setting(
            "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
            "The same as a multiple of the model's max_num_batched_tokens; not set: not checked.",
            ge=0,
        ),
    ] = None
    admission_control: Annotated[
        Literal["token-capacity", "none"],
        setting("DYN_ADMISSION_CONTROL", "none: ignore the thresholds, whoever sets them."),
    ] = "token-capacity"
    admission_queue_limit: Annotated[
        int,
        setting(
            "DYN_ADMISSION_QUEUE_LIMIT", "Streams that may wait for room; 0: they are turned away.", ge=0, le=65536
        ),
    ] = 0
    admission_queue_timeout: Annotated[
        float, setting("DYN_ADMISSION_QUEUE_TIMEOUT_SECS", "How long one of them may wait.", gt=0)
    ] = 30.0
    model_priorities: Annotated[
        tuple[str, ...],
        setting("DYN_MODEL_PRIORITIES", "Points that a model's requests get on top, as name=points,…; for the queue."),
    ] = ()
