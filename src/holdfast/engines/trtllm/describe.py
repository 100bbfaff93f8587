"""What a started TensorRT-LLM is: sizes, capabilities, a name for its arithmetic.

Nothing here was measured on a GPU: what only a measurement could tell is claimed as low as the contract allows.
"""

from __future__ import annotations

import hashlib
from typing import Any

from holdfast.base.limits import TOP_LOGPROBS
from holdfast.engines.contract import Capabilities, EngineInfo, GuidedKind
from holdfast.engines.files import model_files
from holdfast.engines.handoff import Role
from holdfast.engines.trtllm.api import Api
from holdfast.engines.trtllm.config import TrtllmConfig
from holdfast.engines.trtllm.handover import PROTOCOL
from holdfast.models.hf import ModelDirectory

_GUIDED: dict[str, tuple[GuidedKind, ...]] = {
    "none": (),
    "xgrammar": ("json_object", "json_schema", "grammar", "regex", "choice"),
    "llguidance": ("json_object", "json_schema", "regex", "choice"),
}
_UNKNOWN_LENGTH = 2048
"""For models whose files do not say how long they may be."""


def capabilities(api: Api, config: TrtllmConfig, role: Role) -> Capabilities:
    """Return what the engine can do with these settings."""
    return Capabilities(
        continuation="none",
        progress="token",
        max_logprobs=TOP_LOGPROBS,
        guided=_GUIDED[config.guided_decoding_backend],
        logit_bias=True,
        penalties=api.penalises,
        prefix_cache=True,
        kv_events=config.publish_kv_events,
        kv_hashes="engine",
        not_restored=("seed", "penalties", "guided"),
        handoff="" if role == "aggregated" else PROTOCOL,
        handoff_phase="after_prefill",
        cancel_until="pre_handoff",
        lora=config.enable_lora,
    )


def describe(
    api: Api, llm: Any, config: TrtllmConfig, directory: ModelDirectory, *, role: Role, blocks: int
) -> EngineInfo:
    """Return what the started engine says about itself.

    Args:
        api: the loaded package.
        llm: the engine.
        config: our settings.
        directory: of the model.
        role: what the worker does of a request.
        blocks: KV blocks of one rank, 0 when it did not say.
    """
    text = directory.text
    settled = getattr(getattr(llm, "args", None), "max_seq_len", None)
    return EngineInfo(
        engine="trtllm",
        version=api.version,
        model=config.model_name or config.model,
        context_length=config.context_length or settled or text.context_length or _UNKNOWN_LENGTH,
        block_size=config.block_size,
        total_kv_blocks=blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_tokens,
        eos_token_ids=text.eos_token_ids,
        vocab_size=text.vocab_size,
        fingerprint=_fingerprint(api, config, directory),
        capabilities=capabilities(api, config, role),
        files=model_files(text),
        data_parallel_size=ranks_of(config),
        role=role,
    )


def ranks_of(config: TrtllmConfig) -> int:
    """Return the data-parallel ranks: those of the tensor-parallel group, when attention is data-parallel."""
    return config.tensor_parallel_size if config.enable_attention_dp else 1


def _fingerprint(api: Api, config: TrtllmConfig, directory: ModelDirectory) -> str:
    """Equal names promise equal arithmetic on GPUs of one kind; the kind is not looked at."""
    parts = (
        "trtllm", api.version, directory.architecture, directory.dtype, directory.quantization,
        " ".join(sorted(file.name for file in directory.weights.files)), str(directory.weights.bytes),
        str(config.tensor_parallel_size), str(config.pipeline_parallel_size), config.override_engine_args,
    )  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
