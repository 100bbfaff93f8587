"""What a started SGLang is, as the worker and its callers need to know it.

Must never import SGLang at module level.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import msgspec

from holdfast.engines.contract import Capabilities, Continuation, EngineInfo, Restored
from holdfast.engines.files import model_files
from holdfast.engines.handoff import Role
from holdfast.engines.sglang.sampling import GUIDED, LONGEST_TOPS
from holdfast.models.text_files import TextFiles

PROTOCOL = "sglang"
_EXACT_DTYPES = frozenset(("float32", "torch.float32", "float"))


class Facts(msgspec.Struct, frozen=True):
    """What SGLang says after its start."""

    server_args: Any
    state: dict[str, Any]
    """Of its first scheduler: ``get_internal_state``."""
    scheduler: dict[str, Any]
    """``max_total_num_tokens``, ``max_req_input_len``."""
    model_config: Any

    @property
    def seeds(self) -> bool:
        """Sampling is keyed by (seed, position), and results do not depend on who else is in a batch."""
        return bool(self.server_args.enable_deterministic_inference)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return int(self.server_args.dp_size)

    @property
    def dtype(self) -> str:
        """Of weights and sums."""
        return str(self.model_config.dtype)


def describe(facts: Facts, text: TextFiles, name: str, role: Role, *, guided: bool, rendezvous: str) -> EngineInfo:
    """Return what the engine says about itself.

    The context is a few tokens shorter than SGLang's: prompts are limited to its ``max_req_input_len``, and a sequence
    that grew longer than that could not be continued on another worker.

    Args:
        facts: from SGLang.
        text: the model's own files.
        name: of the model.
        role: of the worker.
        guided: it has a tokenizer.
        rendezvous: where decode workers meet it; empty unless it is a prefill worker.
    """
    arguments, state = facts.server_args, facts.state
    total = int(facts.scheduler["max_total_num_tokens"])
    version = importlib.metadata.version("sglang")
    return EngineInfo(
        engine="sglang",
        version=version,
        model=name,
        context_length=int(facts.scheduler["max_req_input_len"]) + 1,
        block_size=int(arguments.page_size),
        total_kv_blocks=total // int(arguments.page_size),
        max_num_seqs=int(state.get("effective_max_running_requests_per_dp") or state["max_running_requests"]),
        max_num_batched_tokens=int(state.get("chunked_prefill_size") or state["max_prefill_tokens"]),
        eos_token_ids=text.eos_token_ids,
        vocab_size=int(facts.model_config.vocab_size),
        fingerprint=_fingerprint(version, facts),
        capabilities=capabilities(facts, role, guided=guided),
        files=model_files(text),
        data_parallel_size=facts.ranks,
        role=role,
        rendezvous=rendezvous,
    )


def capabilities(facts: Facts, role: Role, *, guided: bool) -> Capabilities:
    """Return what it can do, as it was started."""
    continuation: Continuation = "none"
    if facts.seeds:
        continuation = "exact"
    elif facts.dtype in _EXACT_DTYPES:
        continuation = "greedy"
    lost: tuple[Restored, ...] = ("penalties",) if facts.seeds else ("penalties", "seed")
    return Capabilities(
        continuation=continuation,
        progress="token",
        position_keyed_seed=facts.seeds,
        max_logprobs=LONGEST_TOPS,
        guided=GUIDED if guided else (),
        logit_bias=True,
        penalties=True,
        prefix_cache=not facts.server_args.disable_radix_cache,
        kv_events=not facts.server_args.disable_radix_cache,
        kv_hashes="engine",
        not_restored=lost,
        handoff="" if role == "aggregated" else PROTOCOL,
        handoff_phase="after_prefill" if role == "aggregated" else "rendezvous",
        local_prefill=role == "aggregated",
        lora=bool(facts.server_args.enable_lora),
    )


def _fingerprint(version: str, facts: Facts) -> str:
    """Return a name for (version, weights, arithmetic): equal names promise equal results.

    What the weights are is told by their files' names and sizes; content would take longer to read than to load.
    """
    arguments = facts.server_args
    weights = sorted((file.name, file.stat().st_size) for file in Path(arguments.model_path).glob("*.safetensors"))
    parts = (
        version,
        weights,
        facts.dtype,
        arguments.device,
        arguments.attention_backend,
        arguments.sampling_backend,
        arguments.quantization,
        arguments.kv_cache_dtype,
        arguments.tp_size,
        arguments.pp_size,
        facts.seeds,
        _device(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _device() -> str:
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        return f"{torch.__version__} {torch.cuda.get_device_name(0)}"
    return f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
