"""Model files for simulated frontends: what the mock engine's worker publishes, and reading it once per process.

Must never hold anything that a universe could change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from holdfast.engines.mock.vocabulary import vocabulary
from holdfast.models.card import ModelCard, PromptFiles
from holdfast.models.store import ArtifactStore
from holdfast.text.model import TextModel, encode_prompt_files, load_text


@functools.cache
def published_files() -> tuple[bytes, ...]:
    """Return what a worker with the mock engine publishes."""
    files = vocabulary().files
    prompt_files = PromptFiles(files.chat_template, files.bos_token, files.eos_token, {})
    return files.tokenizer_json, encode_prompt_files(prompt_files)


_READ: dict[bytes, TextModel] = {}
_encode = msgspec.msgpack.encode


def read_text(
    card: ModelCard,
    store: ArtifactStore,
    *,
    like: TextModel | None = None,
    now: Callable[[], datetime] | None = None,
) -> TextModel | None:
    """Return a model's text machinery, read once per process: it never changes, and takes longer than a universe.

    Arguments as in `text.model.load_text`.
    """
    del now
    if store.get(card.prompt_files) is None or store.get(card.tokenizer) is None:
        return None
    key = _encode(card)
    found = _READ.get(key)
    if found is None:
        found = load_text(card, store, like=like, now=lambda: datetime.fromtimestamp(0, UTC))
        if found is not None:
            _READ[key] = found
    return found
