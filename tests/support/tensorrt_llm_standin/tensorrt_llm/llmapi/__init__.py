"""Stand-in: what the real package exports here."""

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.llmapi.llm import LLM, RequestOutput
from tensorrt_llm.llmapi.llm_args import CacheTransceiverConfig, KvCacheConfig
from tensorrt_llm.sampling_params import GuidedDecodingParams, SamplingParams

__all__ = [
    "LLM", "CacheTransceiverConfig", "DisaggregatedParams", "GuidedDecodingParams", "KvCacheConfig", "RequestOutput",
    "SamplingParams",
]  # fmt: skip
