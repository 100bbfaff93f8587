"""How the mock engine is set up. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from holdfast.base.settings import setting
from holdfast.engines.handoff import CancelUntil, HandoffPhase

ProfileName = Literal["default", "reference", "h100-qwen3-32b-tp2", "b200-minimax-m2.5-fp8-tp4"]
"""Named parameter sets; `profiles` holds them with their sources."""


class MockConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Size, speed and manners of the simulated engine. Blocks are ``block_size`` tokens of KV cache."""

    model_name: Annotated[str, setting("DYN_MOCK_MODEL_NAME", "Name of the model; part of every token's hash.")] = (
        "mock"
    )
    """Part of every generated token's hash, through ``GenerateRequest.model``."""
    profile: Annotated[
        ProfileName,
        setting("DYN_MOCK_PROFILE", "Speed and size of a real model and GPU.", flag="mock-profile"),
    ] = "default"
    """Which timing model applies, and what sizes the settings below have where they are left at their defaults
    (`profiles.applied`)."""
    block_size: Annotated[int, setting("DYN_MOCK_BLOCK_SIZE", "Tokens per KV cache block.", ge=1)] = 16
    """Tokens per KV block; 16 as vLLM ships it."""
    num_blocks: Annotated[
        int, setting("DYN_MOCK_NUM_BLOCKS", "KV cache blocks in all.", flag="mock-num-blocks", ge=1)
    ] = 16_384
    """KV blocks in all: a sequence that needs more is refused, sequences that together need more are pre-empted."""
    data_parallel_size: Annotated[
        int,
        setting(
            "DYN_MOCK_DATA_PARALLEL_SIZE",
            "Data-parallel ranks, each with seats and KV blocks of its own.",
            flag="mock-data-parallel-size",
            ge=1,
            le=64,
        ),
    ] = 1
    """All other numbers are per rank (`ranks`)."""
    max_num_seqs: Annotated[int, setting("DYN_MOCK_MAX_NUM_SEQS", "Sequences running at once.", ge=1)] = 256
    """Sequences that run at once; more wait."""
    max_num_batched_tokens: Annotated[
        int, setting("DYN_MOCK_MAX_NUM_BATCHED_TOKENS", "Tokens computed in one step, prefill and decode.", ge=1)
    ] = 8192
    """Tokens computed in one step: each decoding sequence takes one, prefill chunks share the rest."""
    context_length: Annotated[
        int, setting("DYN_MOCK_CONTEXT_LENGTH", "Longest prompt plus output, in tokens.", ge=2)
    ] = 32_768
    """Longest prompt plus output in tokens."""
    prefix_caching: Annotated[
        bool, setting("DYN_MOCK_PREFIX_CACHING", "Reuse the KV blocks of equal prefixes.", flag="mock-prefix-caching")
    ] = True
    """Whether finished blocks stay in the cache and are found again."""
    chunked_prefill: Annotated[
        bool,
        setting(
            "DYN_MOCK_CHUNKED_PREFILL",
            "Split prompts that exceed one step's token budget.",
            flag="mock-chunked-prefill",
        ),
    ] = True
    """When off, a prompt is computed in one step of its own, however long it is."""
    preemption: Annotated[
        Literal["lifo", "fifo"],
        setting("DYN_MOCK_PREEMPTION", "Who gives way when the KV cache is full.", flag="mock-preemption"),
    ] = "lifo"
    """``lifo``: the newest running sequence is recomputed later; ``fifo``: the oldest."""
    watermark: Annotated[
        float,
        setting(
            "DYN_MOCK_WATERMARK",
            "Share of the KV blocks kept free when a prompt is admitted.",
            flag="mock-watermark",
            ge=0,
            lt=1,
        ),
    ] = 0.0
    """A waiting sequence is admitted only when its whole prompt fits and this share of all blocks stays free, unless
    it would be alone; 0: when its first chunk fits."""
    speedup_ratio: Annotated[
        float,
        setting(
            "DYN_MOCK_SPEEDUP_RATIO", "Divides every modelled step time; 0 = no delay.", flag="mock-speedup-ratio", ge=0
        ),
    ] = 1.0
    """Divides the modelled step times (`timing`); 0: no delay at all."""
    decode_speedup_ratio: Annotated[
        float,
        setting(
            "DYN_MOCK_DECODE_SPEEDUP_RATIO",
            "Divides modelled decode times further; 0 = none.",
            flag="mock-decode-speedup-ratio",
            ge=0,
        ),
    ] = 1.0
    """Divides the decode part once more, as speculative decoding would; 0: decoding takes no time."""
    step_ms: Annotated[
        float | None,
        setting(
            "DYN_MOCK_STEP_MS",
            "Fixed milliseconds per step instead of the model; 0 = instant.",
            flag="mock-step-ms",
            ge=0,
        ),
    ] = None
    """Every step takes exactly this long, on an absolute schedule, and serves whoever is there when it ends; 0: as
    fast as the loop turns; None: `timing`."""
    eos_chance: Annotated[
        float,
        setting(
            "DYN_MOCK_EOS_CHANCE",
            "Chance per token that the sequence ends by itself.",
            flag="mock-eos-chance",
            ge=0,
            le=1,
        ),
    ] = 0.0
    """Chance per token, decided by its hash, that it is the end of sequence; 0: only max_tokens ends."""
    startup_seconds: Annotated[
        float, setting("DYN_MOCK_STARTUP_SECONDS", "Pretended loading time.", flag="mock-startup-seconds", ge=0)
    ] = 0.0
    """How long loading pretends to take, with progress."""
    warmup_seconds: Annotated[
        float, setting("DYN_MOCK_WARMUP_SECONDS", "Pretended warm-up after it.", flag="mock-warmup-seconds", ge=0)
    ] = 0.0
    """How long the phase ``warming`` lasts after loading, without any progress."""
    kv_events: Annotated[
        bool, setting("DYN_MOCK_KV_EVENTS", "Report what the KV cache stores and removes.", flag="mock-kv-events")
    ] = True
    """Whether `take_kv_events` has anything to say."""
    handoff_phase: Annotated[
        HandoffPhase,
        setting(
            "DYN_MOCK_HANDOFF_PHASE",
            "How prefill and decode workers pass KV blocks: after_prefill (as vLLM), or rendezvous (as SGLang).",
            flag="mock-handoff-phase",
        ),
    ] = "after_prefill"
    """See `engines.handoff`."""
    handoff_failure: Annotated[
        Literal["recompute", "fail", "hang"],
        setting(
            "DYN_MOCK_HANDOFF_FAILURE",
            "What a decode worker does when the blocks of a hand-off do not come.",
            flag="mock-handoff-failure",
        ),
    ] = "recompute"
    """``recompute``: computes the prompt itself; ``fail``: ends the sequence with HandoffLost; ``hang``: waits on."""
    local_prefill: Annotated[
        bool,
        setting(
            "DYN_MOCK_LOCAL_PREFILL",
            "Decode workers compute prompts themselves when they have to; SGLang's cannot.",
            flag="mock-local-prefill",
        ),
    ] = True
    """False: a decode worker refuses prompts of more than one token, and never recomputes blocks that do not come."""
    cancel_until: Annotated[
        CancelUntil,
        setting(
            "DYN_MOCK_CANCEL_UNTIL",
            "Until when a decode leg can be cancelled: anytime, or pre_handoff (not while its blocks travel).",
            flag="mock-cancel-until",
        ),
    ] = "anytime"
    """Otherwise a cancel during the transfer takes effect at its end."""
    kv_transfer_bandwidth: Annotated[
        float,
        setting(
            "DYN_MOCK_KV_TRANSFER_BANDWIDTH",
            "GB/s at which KV blocks travel from prefill to decode workers; 0: at once.",
            flag="kv-transfer-bandwidth",
            ge=0,
        ),
    ] = 64.0
    """The reference's default."""
    kv_bytes_per_token: Annotated[
        int,
        setting(
            "DYN_MOCK_KV_BYTES_PER_TOKEN",
            "Bytes of KV cache per token: layers x 2 x kv_heads x head_dim x bytes of a number.",
            flag="kv-bytes-per-token",
            ge=0,
        ),
    ] = 131_072
    """Of an 8B model with grouped attention at 16 bits: 32 layers, 8 heads of 128."""
    directives: Annotated[
        bool, setting("DYN_MOCK_DIRECTIVES", "Obey [[mock:…]] in prompts.", flag="mock-directives")
    ] = True
    """Whether ``[[mock:…]]`` in a prompt is obeyed (`directives` has the grammar)."""
    control: Annotated[
        bool, setting("DYN_MOCK_CONTROL", "Misbehave on command of the control endpoint.", flag="mock-control")
    ] = True
    """Whether `MockEngine.control` obeys."""
    max_loras: Annotated[
        int, setting("DYN_MOCK_MAX_LORAS", "Adapters that it can have at once; 0: none.", flag="mock-max-loras", ge=0)
    ] = 8
    """An adapter's name enters every token's hash (`adapters`)."""
