"""From what an engine says about itself to the model card and the files that frontends fetch.

Must never know a particular engine.
"""

from __future__ import annotations

import msgspec

from holdfast.engines.contract import EngineInfo
from holdfast.models.card import ModelCard, PromptFiles, artifact_of


def adapter_card(base: ModelCard, name: str, weights: str = "") -> ModelCard:
    """Return the card of an adapter of a model: the same files, sizes and abilities under another name.

    Args:
        base: card of the model that it changes.
        name: under which it is served.
        weights: SHA-256 of its files in hex; empty: it has none.
    """
    return msgspec.structs.replace(
        base,
        name=name,
        aliases=(),
        base_model=base.name,
        adapter_weights=weights,
        fingerprint=f"{base.fingerprint}+{weights[:16] or name}",
    )


class Published(msgspec.Struct, frozen=True):
    """A card and the files it names, by SHA-256 in hex."""

    card: ModelCard
    files: dict[str, bytes]


def publish(
    info: EngineInfo, *, name: str = "", aliases: tuple[str, ...] = (), taints: tuple[str, ...] = ()
) -> Published:
    """Return the card of the engine's model and the files behind it.

    Args:
        info: as the started engine gave it.
        name: served name; empty: the engine's own.
        aliases: further names.
        taints: what requests may ask of this worker, as ``key=value``.
    """
    files = info.files
    scalars = {k: v for k, v in files.generation_config.items() if isinstance(v, bool | int | float | str)}
    prompt_files = msgspec.msgpack.encode(PromptFiles(files.chat_template, files.bos_token, files.eos_token, scalars))
    tokenizer, prompt = artifact_of(files.tokenizer_json), artifact_of(prompt_files)
    can = info.capabilities
    card = ModelCard(
        name=name or info.model,
        tokenizer=tokenizer,
        prompt_files=prompt,
        context_length=info.context_length,
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
        block_size=info.block_size,
        engine=info.engine,
        engine_version=info.version,
        fingerprint=info.fingerprint,
        total_kv_blocks=info.total_kv_blocks,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        data_parallel_size=info.data_parallel_size,
        continuation=can.continuation,
        progress=can.progress,
        position_keyed_seed=can.position_keyed_seed,
        max_logprobs=can.max_logprobs,
        guided=can.guided,
        logit_bias=can.logit_bias,
        penalties=can.penalties,
        aliases=aliases,
        taints=taints,
        prefix_cache=can.prefix_cache,
        role=info.role,
        handoff=can.handoff,
        handoff_phase=can.handoff_phase,
        rendezvous=info.rendezvous,
        cancel_until=can.cancel_until,
        local_prefill=can.local_prefill,
        not_restored=can.not_restored,
    )
    return Published(card, {tokenizer.sha256: files.tokenizer_json, prompt.sha256: prompt_files})
