"""What a started vLLM is: sizes, capabilities, text files, and a name for its arithmetic.

Must never say more than was measured (`tests/engines/vllm`).
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

from holdfast.base.limits import TOP_LOGPROBS
from holdfast.engines.contract import Capabilities, Continuation, EngineInfo, ModelFiles, Restored
from holdfast.engines.handoff import Role
from holdfast.engines.vllm.config import VllmConfig
from holdfast.engines.vllm.memory import Reader, gpu_memory, host_memory
from holdfast.models.files import locate
from holdfast.models.hf import read_directory

_SAMPLE_BYTES = 1 << 20
_RECIPE = "1"
"""Changes when this adapter's own way of asking changes."""


def describe(llm: Any, config: VllmConfig, role: Role) -> EngineInfo:
    """Return what the started engine says about itself.

    Args:
        llm: vLLM's ``AsyncLLM``.
        config: our settings.
        role: what the worker does of a request.
    """
    import vllm  # noqa: PLC0415

    settled = llm.vllm_config
    model, cache, scheduler = settled.model_config, settled.cache_config, settled.scheduler_config
    path = locate(config.model)
    directory = read_directory(path)
    text = directory.text
    served = model.served_model_name
    return EngineInfo(
        engine="vllm",
        version=vllm.__version__,
        model=served if isinstance(served, str) and served != config.model else path.name,
        context_length=model.max_model_len,
        block_size=cache.block_size,
        total_kv_blocks=cache.num_gpu_blocks or 0,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        eos_token_ids=text.eos_token_ids,
        vocab_size=model.get_vocab_size(),
        fingerprint=fingerprint(path, settled, vllm.__version__),
        capabilities=capabilities(settled, config),
        files=ModelFiles(
            tokenizer_json=text.tokenizer_json,
            chat_template=text.chat_template,
            bos_token=text.bos_token,
            eos_token=text.eos_token,
            generation_config=text.generation_config,
        ),
        data_parallel_size=settled.parallel_config.data_parallel_size,
        role=role,
    )


def continuation(dtype: str, *, on_cpu: bool = True) -> Continuation:
    """Return what a continuation from ids equals, by the arithmetic.

    Measured with SmolLM2. On the CPU: at float32 every greedy continuation was that of the undisturbed run; at bfloat16
    four of five, because the same values come out differently when they are computed in another order. On a GPU (H200,
    vLLM 0.26) nothing can be promised: at float32 2 of 40 answers of 300 tokens differed, and in another run one did
    that had never moved; with ``VLLM_BATCH_INVARIANT`` and bfloat16 answers no longer depended on their neighbours (16
    of 16), but 4 of 32 continuations differed all the same: a prompt is computed by other kernels than a token.

    Args:
        dtype: of the arithmetic, as ``float32``.
        on_cpu: whether a CPU computes.
    """
    return "greedy" if on_cpu and dtype == "float32" else "none"


def capabilities(settled: Any, config: VllmConfig) -> Capabilities:
    """Return what this vLLM can do."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    dtype = str(settled.model_config.dtype).removeprefix("torch.")
    caches = bool(settled.cache_config.enable_prefix_caching)
    events = settled.kv_events_config
    transfer = settled.kv_transfer_config
    connector = transfer.kv_connector if transfer is not None else None
    exact = continuation(dtype, on_cpu=current_platform.is_cpu())
    lost: list[Restored] = [] if config.replay == "always" else ["seed", "penalties"]
    if config.replay == "never":
        lost.append("guided")
    return Capabilities(
        continuation="exact" if config.replay == "always" and exact == "greedy" else exact,
        progress="step",
        position_keyed_seed=False,
        max_logprobs=min(TOP_LOGPROBS, settled.model_config.max_logprobs),
        guided=("json_object", "json_schema", "grammar", "regex", "choice"),
        logit_bias=True,
        penalties=True,
        prefix_cache=caches,
        kv_events=caches and config.kv_events and events is not None and bool(events.enable_kv_cache_events),
        kv_hashes="engine",
        not_restored=tuple(lost),
        handoff={"NixlConnector": "nixl"}.get(connector or "", ""),
        handoff_phase="after_prefill",
        cancel_until="pre_handoff" if connector else "anytime",
        lora=settled.lora_config is not None,
    )


def fingerprint(path: Path, settled: Any, version: str) -> str:
    """Return a short name for (vLLM, weights, precision, processor …): equal ones promise equal arithmetic."""
    from vllm import envs  # noqa: PLC0415

    parallel = settled.parallel_config
    parts = [
        _RECIPE,
        version,
        str(settled.model_config.dtype),
        str(settled.model_config.quantization),
        str(settled.cache_config.cache_dtype),
        f"{parallel.tensor_parallel_size}/{parallel.pipeline_parallel_size}",
        str(settled.model_config.enforce_eager),
        _processor(),
        _weights(path),
        *(["batch invariant"] if getattr(envs, "VLLM_BATCH_INVARIANT", False) else []),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _weights(path: Path) -> str:
    """Return a hash over names, sizes and beginnings of the weight files, and the configuration."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix not in {".safetensors", ".bin", ".json"} or file.name.startswith("tokenizer"):
            continue
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_SAMPLE_BYTES))
            opened.seek(max(0, file.stat().st_size - _SAMPLE_BYTES))
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _processor() -> str:
    """Return the device that computes, as vLLM names it; on the CPU with its model."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return f"{platform.machine()} {facts.get('model name', '')} {facts.get('flags', '')}"


def memory_reader(settled: Any) -> Reader:
    """Return what tells how much memory is free and needed, before vLLM is started."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    parallel = settled.parallel_config
    devices = parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.data_parallel_size
    if not current_platform.is_cpu():
        share = settled.cache_config.gpu_memory_utilization
        return lambda: gpu_memory(share, devices)
    weights = read_directory(locate(settled.model_config.model)).weights.bytes
    kv_bytes = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "0") or 0) << 30
    return lambda: host_memory(weights * devices, kv_bytes * devices)
