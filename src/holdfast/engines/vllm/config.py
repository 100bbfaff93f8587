"""Holdfast's own settings of the vLLM engine. Everything else is vLLM's own flag. Must never import vLLM."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from holdfast.base.settings import setting

KvTransfer = Literal["auto", "nixl", "none"]
Replay = Literal["never", "guided", "always"]


class VllmConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to run vLLM. Flags that Holdfast does not know go to vLLM's own parser, in their order.

    For example: ``holdfast worker --engine vllm --model DIR --dtype float32 --max-model-len 4096``.
    """

    model: Annotated[
        str,
        setting(
            "DYN_VLLM_MODEL", "A Hugging Face directory, or a name that is in the Hugging Face cache.", flag="model"
        ),
    ] = ""
    """What vLLM loads; needed."""
    args: Annotated[
        str,
        setting("DYN_VLLM_ARGS", "Flags for vLLM itself, as on a command line; those of the command line follow."),
    ] = ""
    """Split as a shell does; a flag on the command line wins because it comes later."""
    kv_events: Annotated[
        bool, setting("DYN_VLLM_KV_EVENTS", "Have vLLM tell which KV blocks it holds, for routing by caches.")
    ] = True
    """Needs vLLM's prefix caching. Costs about one message per filled block."""
    kv_transfer: Annotated[
        KvTransfer,
        setting(
            "DYN_VLLM_KV_TRANSFER",
            "How KV blocks get from prefill to decode workers: auto (nixl for these roles, else none), nixl, none.",
        ),
    ] = "auto"
    """Ignored when --kv-transfer-config is given to vLLM itself."""
    nixl_host: Annotated[
        str, setting("DYN_VLLM_NIXL_HOST", "Address at which decode workers reach this worker's NIXL side channel.")
    ] = "127.0.0.1"
    """Its port is VLLM_NIXL_SIDE_CHANNEL_PORT, or a free one."""
    kv_lease: Annotated[
        int, setting("DYN_VLLM_KV_LEASE_SECS", "How long a prefill worker keeps blocks that nobody fetches.", ge=1)
    ] = 30
    """vLLM's ``kv_lease_duration``; decode workers that wait extend it."""
    replay: Annotated[
        Replay,
        setting(
            "DYN_VLLM_REPLAY",
            "Which continuations generate what exists again, to restore what vLLM cannot: guided (grammars), always "
            "(also penalties and seeds; a migration then takes as long as the text did), never (guided is refused).",
        ),
    ] = "guided"
    """See `replay.Replay`."""
    max_waiting: Annotated[
        int, setting("DYN_VLLM_MAX_WAITING", "Sequences beyond vLLM's seats that are kept; more are refused.", ge=0)
    ] = 1024
    """More are refused as `WorkerSaturated`."""
    memory_wait: Annotated[
        float,
        setting(
            "DYN_VLLM_MEMORY_WAIT_SECS",
            "How long a start waits for memory that a predecessor still holds; 0: not at all.",
            ge=0,
        ),
    ] = 60.0
    """Afterwards vLLM is started all the same, and says itself what is missing."""
