"""The mock engine's own text machinery: a byte-level BPE tokenizer and a ChatML template, both package data.

Must never be needed to produce a token: only directives and structured output touch text.
"""

from __future__ import annotations

import functools
import re
from importlib import resources

from tokenizers import Tokenizer

from holdfast.engines.contract import ModelFiles

EOS_TOKEN = "<|im_end|>"
DIRECTIVE_MARK = "[[mock:"
_WORD = re.compile(r"Ġ[a-z]{3,}")
"""Tokens that generated text is made of: a space and a lower-case word."""


class Vocabulary:
    """The tokenizer with what the engine asks of it, looked up once."""

    def __init__(self, files: ModelFiles):
        self.files = files
        self._tokenizer = Tokenizer.from_str(files.tokenizer_json.decode())
        ids: dict[str, int] = self._tokenizer.get_vocab()
        self.size = self._tokenizer.get_vocab_size()
        self.eos_id = ids[EOS_TOKEN]
        self.eos_ids = (ids[EOS_TOKEN], ids["<|endoftext|>"])
        self.mark_id = ids[DIRECTIVE_MARK]
        self.user_turn_ids = self.encode("<|im_start|>user")
        self.words = tuple(sorted(number for text, number in ids.items() if _WORD.fullmatch(text)))
        """Ids of ordinary printable tokens, ascending."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; markers and special tokens in it become their own ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def model_files() -> ModelFiles:
    """Return the files as they travel to frontends."""
    data = resources.files("holdfast.engines.mock") / "data"
    return ModelFiles(
        tokenizer_json=(data / "tokenizer.json").read_bytes(),
        chat_template=(data / "chat_template.jinja").read_text(encoding="utf-8"),
        eos_token=EOS_TOKEN,
    )


@functools.cache
def vocabulary() -> Vocabulary:
    """Return the one vocabulary of this process (about 10 ms the first time)."""
    return Vocabulary(model_files())
