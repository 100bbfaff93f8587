"""The model card: what a worker publishes about a model it serves.

Tokenizer, chat template and generation config are named by content hash and fetched from any worker
that has them (`models.store`). Must never hold the files themselves.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

ModelState = Literal["loading", "ready", "failed"]


class Artifact(msgspec.Struct, frozen=True):
    """A file by content: ``sha256`` in hex and its size in bytes."""

    sha256: str
    size: int


def artifact_of(data: bytes) -> Artifact:
    """Return the name of these bytes."""
    return Artifact(hashlib.sha256(data).hexdigest(), len(data))


class ModelCard(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model (base or adapter) as served by one instance.

    The fields above ``worker fields`` must agree between all workers of one model name; `disagreement`
    names the first that does not. Sizes are tokens unless said otherwise.
    """

    name: str
    tokenizer: Artifact
    """Hugging Face ``tokenizer.json``."""
    prompt_files: Artifact
    """msgpack of `PromptFiles`: chat template, special tokens, generation config."""
    context_length: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    block_size: int
    base_model: str | None = None
    """Served name of the model that this adapter changes; None: this is no adapter."""
    adapter_weights: str = ""
    """SHA-256 in hex of an adapter's files; empty: no adapter, or its engine does not say."""
    # worker fields
    engine: str = ""
    engine_version: str = ""
    fingerprint: str = ""
    state: ModelState = "ready"
    total_kv_blocks: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    data_parallel_size: int = 1
    """Ranks; blocks, seats and tokens per step above are those of one."""
    continuation: str = "none"
    progress: str = "none"
    position_keyed_seed: bool = False
    max_logprobs: int = -1
    guided: tuple[str, ...] = ()
    logit_bias: bool = False
    penalties: bool = False
    aliases: tuple[str, ...] = ()
    taints: tuple[str, ...] = ()
    """What requests may ask of a worker, as ``key=value``: topology (``dynamo.topology/zone=a``), hardware …"""
    prefix_cache: bool = True
    """Equal beginnings of prompts are computed once."""
    role: str = "aggregated"
    """``prefill`` workers get prompts only and never a client's stream."""
    handoff: str = ""
    """Protocol in which KV blocks pass from prefill to decode workers; empty: none."""
    handoff_phase: str = "after_prefill"
    rendezvous: str = ""
    """``host:port`` at which decode legs meet this prefill worker."""
    cancel_until: str = "anytime"
    local_prefill: bool = True
    """False: a decode worker that computes no prompts, and gets no stream without a hand-off."""
    not_restored: tuple[str, ...] = ()
    """What a continuation starts anew on this engine: ``seed``, ``penalties``, ``min_tokens``, ``guided``."""

    @property
    def lora(self) -> str | None:
        """Name of the adapter that requests for this model use; it enters the hashes of their KV blocks."""
        return self.name if self.base_model is not None else None


class PromptFiles(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a frontend needs, beside the tokenizer, to turn messages into a prompt."""

    chat_template: str
    bos_token: str = ""
    eos_token: str = ""
    generation_config: dict[str, float | int | bool | str] = {}


AGREED_FIELDS = (
    "tokenizer",
    "prompt_files",
    "context_length",
    "eos_token_ids",
    "vocab_size",
    "block_size",
    "base_model",
    "adapter_weights",
)


def disagreement(known: ModelCard, other: ModelCard) -> str | None:
    """Return the first field in which two cards of one model name contradict each other, or None."""
    for field in AGREED_FIELDS:
        if getattr(known, field) != getattr(other, field):
            return field
    return None
