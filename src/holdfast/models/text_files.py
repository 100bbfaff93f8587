"""What frontends need of a model to turn messages into tokens and tokens into text, whatever file it came from.

Must never know where it came from (`models.gguf`, `models.hf`).
"""

from __future__ import annotations

from typing import Any

import msgspec


class TextFiles(msgspec.Struct, frozen=True):
    """The text machinery of one model."""

    tokenizer_json: bytes
    """Hugging Face ``tokenizer.json``."""
    chat_template: str
    """Jinja source; empty when the model has none."""
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]
    """Every token that ends a generation, ascending."""
    context_length: int
    """Tokens the model was trained for; 0 when its files do not say."""
    vocab_size: int
    generation_config: dict[str, Any] = {}
    """What the model's authors recommend (temperature, top_p …); scalars only."""
