"""What the mock engine says about itself. Must never depend on what it is doing."""

from __future__ import annotations

from holdfast.base.limits import TOP_LOGPROBS
from holdfast.engines.contract import Capabilities, EngineInfo
from holdfast.engines.handoff import Role
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.legs import PROTOCOL
from holdfast.engines.mock.vocabulary import Vocabulary

VERSION = "1"


def engine_info(
    config: MockConfig, vocabulary: Vocabulary, role: Role = "aggregated", rendezvous: str = ""
) -> EngineInfo:
    """Return what a started engine with these settings tells its worker.

    Args:
        config: of the engine.
        vocabulary: its tokens.
        role: what its worker does.
        rendezvous: ``host:port`` where decode legs meet it; empty: nowhere.
    """
    return EngineInfo(
        engine="mock",
        version=VERSION,
        model=config.model_name,
        context_length=config.context_length,
        block_size=config.block_size,
        total_kv_blocks=config.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=vocabulary.eos_ids,
        vocab_size=vocabulary.size,
        fingerprint=f"mock-{VERSION}-{config.eos_chance}",
        capabilities=Capabilities(
            continuation="exact",
            progress="step",
            position_keyed_seed=True,
            max_logprobs=TOP_LOGPROBS,
            guided=("json_object", "json_schema", "choice"),
            logit_bias=True,
            penalties=True,
            prefix_cache=config.prefix_caching,
            kv_events=config.kv_events and config.prefix_caching,
            kv_hashes="sequence",
            handoff=PROTOCOL,
            handoff_phase=config.handoff_phase,
            cancel_until=config.cancel_until,
            local_prefill=config.local_prefill or role != "decode",
        ),
        files=vocabulary.files,
        role=role,
        rendezvous=rendezvous,
    )
