"""Settings of the TensorRT-LLM engine. Must never import an engine library: the command line reads this."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from holdfast.base.settings import setting

GuidedBackend = Literal["none", "xgrammar", "llguidance"]
TransferBackend = Literal["DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI"]


class TrtllmConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What ``tensorrt_llm.LLM`` is made with, and how it is watched. Names and variables are the reference's."""

    model: Annotated[
        str, setting("DYN_TRTLLM_MODEL", "Model directory, or a name in the Hugging Face cache.", flag="model")
    ] = ""
    """Nothing is downloaded."""
    model_name: Annotated[str, setting("DYN_TRTLLM_MODEL_NAME", "Name of the model; empty: as it was given.")] = ""
    """What the engine calls itself; `WorkerConfig.served_model_name` goes before it."""
    tensor_parallel_size: Annotated[
        int, setting("DYN_TRTLLM_TENSOR_PARALLEL_SIZE", "GPUs that share each layer.", ge=1)
    ] = 1
    """With attention data parallelism also the number of ranks."""
    pipeline_parallel_size: Annotated[
        int, setting("DYN_TRTLLM_PIPELINE_PARALLEL_SIZE", "Stages of layers, on GPUs of their own.", ge=1)
    ] = 1
    """``tensor_parallel_size`` GPUs per stage."""
    enable_attention_dp: Annotated[
        bool, setting("DYN_TRTLLM_ENABLE_ATTENTION_DP", "Data-parallel attention: each rank has its own KV cache.")
    ] = False
    """Ranks are told apart in load, KV events and routing."""
    block_size: Annotated[
        int, setting("DYN_TRTLLM_KV_BLOCK_SIZE", "Tokens per KV block.", flag="kv-block-size", ge=1)
    ] = 32
    """``KvCacheConfig.tokens_per_block``."""
    max_num_seqs: Annotated[
        int, setting("DYN_TRTLLM_MAX_BATCH_SIZE", "Sequences running at once.", flag="max-batch-size", ge=1)
    ] = 256
    """``LLM(max_batch_size=…)``."""
    max_num_tokens: Annotated[
        int, setting("DYN_TRTLLM_MAX_NUM_TOKENS", "Tokens computed in one step, prefill and decode.", ge=1)
    ] = 8192
    """Without chunked prefill also the longest prompt."""
    context_length: Annotated[
        int,
        setting("DYN_TRTLLM_MAX_SEQ_LEN", "Longest prompt plus output; 0: the model's.", flag="max-seq-len", ge=0),
    ] = 0
    """``LLM(max_seq_len=…)``."""
    chunked_prefill: Annotated[
        bool, setting("DYN_TRTLLM_ENABLE_CHUNKED_PREFILL", "Split prompts that exceed one step's token budget.")
    ] = True
    """Off, longer prompts are refused."""
    free_gpu_memory_fraction: Annotated[
        float, setting("DYN_TRTLLM_FREE_GPU_MEMORY_FRACTION", "Share of free GPU memory for the KV cache.", gt=0, le=1)
    ] = 0.9
    """Of what is free after the weights are loaded."""
    trust_remote_code: Annotated[
        bool, setting("DYN_TRTLLM_TRUST_REMOTE_CODE", "Run code that comes with the model.")
    ] = False
    """Only for models whose authors you trust."""
    guided_decoding_backend: Annotated[
        GuidedBackend, setting("DYN_TRTLLM_GUIDED_DECODING_BACKEND", "Who constrains structured output; none: nobody.")
    ] = "none"
    """``none``: requests for structured output are refused. Otherwise the engine loads the tokenizer too."""
    transfer_backend: Annotated[
        TransferBackend, setting("DYN_TRTLLM_CACHE_TRANSCEIVER", "How prefill hands KV blocks to decode.")
    ] = "DEFAULT"
    """Used by prefill and decode workers only."""
    enable_lora: Annotated[bool, setting("DYN_TRTLLM_ENABLE_LORA", "Serve LoRA adapters.")] = False
    """Further details go into ``override_engine_args`` (``lora_config``)."""
    publish_kv_events: Annotated[
        bool, setting("DYN_TRTLLM_PUBLISH_KV_EVENTS", "Tell frontends what the KV cache holds.")
    ] = True
    """Needs block reuse, which is on."""
    event_buffer_max_size: Annotated[
        int, setting("DYN_TRTLLM_EVENT_BUFFER", "KV events that the engine keeps until they are fetched.", ge=1)
    ] = 65_536
    """When it overflows, events are lost; that is noticed, and frontends are told to forget what they knew."""
    max_waiting: Annotated[int, setting("DYN_TRTLLM_MAX_WAITING", "Sequences that may wait; more are refused.")] = 1024
    """Beyond ``max_num_seqs``."""
    override_engine_args: Annotated[
        str,
        setting(
            "DYN_TRTLLM_OVERRIDE_ENGINE_ARGS",
            "JSON object of further arguments of tensorrt_llm.LLM; kv_cache_config is merged.",
        ),
    ] = ""
    """Goes over everything else."""
