"""From settings to the arguments of ``tensorrt_llm.LLM``. Must never start anything."""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.engines.handoff import Role
from holdfast.engines.trtllm.api import Api
from holdfast.engines.trtllm.config import TrtllmConfig


def engine_arguments(api: Api, config: TrtllmConfig, *, model: str, role: Role) -> dict[str, Any]:
    """Return the keyword arguments.

    Args:
        api: the loaded package.
        config: our settings.
        model: directory of the model.
        role: prefill and decode workers get a cache transceiver.

    Raises:
        InvalidRequest: ``override_engine_args`` is not a JSON object.
    """
    guided = config.guided_decoding_backend != "none"
    arguments: dict[str, Any] = {
        "model": model,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enable_attention_dp": config.enable_attention_dp,
        "max_batch_size": config.max_num_seqs,
        "max_num_tokens": config.max_num_tokens,
        "enable_chunked_prefill": config.chunked_prefill,
        "enable_iter_perf_stats": True,
        "skip_tokenizer_init": not guided,  # token ids in and out; constraints need to know what they spell
        "trust_remote_code": config.trust_remote_code,
    }
    if config.context_length:
        arguments["max_seq_len"] = config.context_length
    if guided:
        arguments["guided_decoding_backend"] = config.guided_decoding_backend
    if config.enable_lora:
        arguments["enable_lora"] = True
    if role != "aggregated":
        arguments["cache_transceiver_config"] = api.CacheTransceiverConfig(backend=config.transfer_backend)
    overrides = _overrides(config.override_engine_args)
    cache = {**_cache(config), **(overrides.pop("kv_cache_config", None) or {})}
    return {**arguments, **overrides, "kv_cache_config": api.KvCacheConfig(**cache)}


def _cache(config: TrtllmConfig) -> dict[str, Any]:
    return {
        "enable_block_reuse": True,
        "enable_partial_reuse": False,  # a partly filled block has no name that others could know
        "free_gpu_memory_fraction": config.free_gpu_memory_fraction,
        "tokens_per_block": config.block_size,
        "event_buffer_max_size": config.event_buffer_max_size if config.publish_kv_events else 0,
    }


def _overrides(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidRequest(
            f"DYN_TRTLLM_OVERRIDE_ENGINE_ARGS is not a JSON object: {error}.", param="override_engine_args"
        ) from error
