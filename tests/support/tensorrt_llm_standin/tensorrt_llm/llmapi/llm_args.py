"""Stand-in: configurations, with the fields that the adapter sets. Unknown arguments are refused."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class KvCacheConfig:
    """KV cache; ``max_tokens`` is what the stand-in takes for the memory of the GPU."""

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    free_gpu_memory_fraction: float | None = 0.9
    event_buffer_max_size: int = 0
    enable_partial_reuse: bool = True
    tokens_per_block: int = 32


@dataclass(kw_only=True)
class CacheTransceiverConfig:
    """How KV blocks travel."""

    backend: str | None = None
