"""The one place that imports ``tensorrt_llm``: what of it is called, by name.

`NAMES` and `ARGUMENTS` are compared with the recorded signatures of the real package by tests/engines/trtllm; whoever
calls something more adds it there. Must never be imported before the engine starts: loading it takes seconds and a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

from holdfast.base.errors import EngineFailed

OLDEST = (1, 2)
NEWEST = (1, 4)
"""Versions whose signatures were compared; others are tried with a warning."""
PENALTIES_FROM = (1, 3)
"""Before, the default sampler takes penalties and ignores them (its issue 9442)."""
PENALTIES_RC = 24
"""Of the release candidates of that version, the first whose documentation names them."""
PRIORITY_FROM = (1, 3)
"""``generate_async`` has ``priority`` from here on."""

NAMES: dict[str, str] = {
    "LLM": "tensorrt_llm",
    "SamplingParams": "tensorrt_llm",
    "GuidedDecodingParams": "tensorrt_llm.llmapi",
    "KvCacheConfig": "tensorrt_llm.llmapi",
    "CacheTransceiverConfig": "tensorrt_llm.llmapi",
    "DisaggregatedParams": "tensorrt_llm.llmapi",
    "SchedulingParams": "tensorrt_llm.scheduling_params",
    "LoRARequest": "tensorrt_llm.executor.request",
    "Logprob": "tensorrt_llm.executor.result",
    "RequestError": "tensorrt_llm.executor.utils",
}
"""Class by the module that it is taken from."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "LLM": (
        "model", "tensor_parallel_size", "pipeline_parallel_size", "enable_attention_dp", "max_batch_size",
        "max_num_tokens", "max_seq_len", "enable_chunked_prefill", "kv_cache_config", "cache_transceiver_config",
        "enable_iter_perf_stats", "guided_decoding_backend", "enable_lora", "trust_remote_code", "skip_tokenizer_init",
    ),
    "LLM.generate_async": (
        "inputs", "sampling_params", "lora_request", "streaming", "disaggregated_params", "scheduling_params",
        "cache_salt", "priority",
    ),
    "LLM.get_stats_async": ("timeout",),
    "LLM.get_kv_cache_events_async": ("timeout",),
    "LLM.shutdown": (),
    "LLM._check_health": (),
    "RequestOutput.abort": (),
    "SamplingParams": (
        "end_id", "max_tokens", "min_tokens", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "seed",
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "embedding_bias", "logprobs", "guided_decoding", "detokenize", "add_special_tokens",
    ),
    "GuidedDecodingParams": ("json", "regex", "grammar", "json_object"),
    "KvCacheConfig": (
        "enable_block_reuse", "enable_partial_reuse", "free_gpu_memory_fraction", "tokens_per_block",
        "event_buffer_max_size",
    ),
    "CacheTransceiverConfig": ("backend",),
    "DisaggregatedParams": (
        "request_type", "first_gen_tokens", "first_gen_log_probs", "ctx_request_id", "opaque_state", "draft_tokens",
        "disagg_request_id", "ctx_dp_rank", "ctx_info_endpoint",
    ),
    "SchedulingParams": ("attention_dp_rank", "attention_dp_relax"),
    "LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    "Logprob": ("logprob", "rank"),
}  # fmt: skip
"""Every argument that is passed anywhere."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "RequestOutput": ("outputs", "finished", "cached_tokens", "error"),
    "CompletionOutput": ("token_ids", "logprobs", "finish_reason", "disaggregated_params"),
    "LLM": ("_executor", "args"),
    "IterationResult": ("mark_undone",),
}
"""Every attribute that is read."""


class Api:
    """The classes of `NAMES` as attributes, and the version."""

    LLM: Any
    SamplingParams: Any
    GuidedDecodingParams: Any
    KvCacheConfig: Any
    CacheTransceiverConfig: Any
    DisaggregatedParams: Any
    SchedulingParams: Any
    LoRARequest: Any
    Logprob: Any
    RequestError: Any

    def __init__(self) -> None:
        self.version = str(importlib.import_module("tensorrt_llm").__version__)
        for name, module in NAMES.items():
            setattr(self, name, getattr(importlib.import_module(module), name))

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor number."""
        parts = [int("".join(c for c in part if c.isdigit()) or 0) for part in self.version.split(".")[:2]]
        return (parts[0], parts[1] if len(parts) > 1 else 0)

    @property
    def penalises(self) -> bool:
        """Whether the default sampler applies penalties."""
        _, _, candidate = self.version.partition("rc")
        if self.release == PENALTIES_FROM and candidate.isdigit():
            return int(candidate) >= PENALTIES_RC
        return self.release >= PENALTIES_FROM

    @property
    def prioritises(self) -> bool:
        """Whether requests have a priority."""
        return self.release >= PRIORITY_FROM

    def bias(self, vocab_size: int, bias: dict[int, float]) -> Any:
        """Return logit biases as the tensor that ``embedding_bias`` wants."""
        torch = importlib.import_module("torch")
        tensor = torch.zeros(vocab_size, dtype=torch.float32)
        for token, value in bias.items():
            tensor[token] = value
        return tensor


def load_api() -> Api:
    """Import TensorRT-LLM. Raises EngineFailed with what to install."""
    try:
        return Api()
    except (ImportError, AttributeError, OSError) as error:
        raise EngineFailed(
            f"TensorRT-LLM cannot be loaded: {error}. It needs an NVIDIA GPU, its driver and the package tensorrt_llm "
            f"{OLDEST[0]}.{OLDEST[1]} or newer (pip install 'holdfast[trtllm]'); 'holdfast doctor engines' shows what "
            "is missing."
        ) from error
