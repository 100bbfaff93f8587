"""What requests ask for beside their prompt, worked out once for all that ask for the same.

Clients vary what they say and seldom how they want it answered. Only plain wishes are remembered: numbers and flags,
nothing that is large or that a client could make up endlessly. Must never remember a prompt.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from holdfast.models.card import ModelCard
from holdfast.openai.mapping import Defaults, GenerationSpec, chat_spec, completion_spec
from holdfast.openai.types import ChatCompletionRequest, CommonRequest, CompletionRequest

KEPT = 256
"""Different wishes that are remembered of one model; then all are forgotten, for somebody varies them all the time."""

_PLAIN = (
    "stream", "stream_options", "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "max_tokens",
    "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "include_stop_str_in_output",
    "skip_special_tokens", "return_tokens_as_token_ids", "priority", "logprobs",
)  # fmt: skip
"""Fields of both surfaces that may differ; `stream_options` is frozen and can be looked up like a number."""
_OF_CHAT = ("parallel_tool_calls", "top_logprobs", "max_completion_tokens")
_OF_TEXT = ("echo", "best_of")
_SAYS_NOTHING = frozenset({"model", "messages", "prompt", "user", "metadata", "store", "service_tier", "suffix"})
"""Fields that change no spec."""


def _getters(kind: type[CommonRequest], plain: tuple[str, ...]) -> tuple[Any, Any, tuple[None, ...]]:
    """Return what reads the plain fields, what reads all others that matter, and what it reads when none was given."""
    others = [name for name in kind.__struct_fields__ if name not in _SAYS_NOTHING and name not in plain]
    return attrgetter(*plain), attrgetter(*others), (None,) * len(others)


_chat, _chat_others, _chat_none = _getters(ChatCompletionRequest, (*_PLAIN, *_OF_CHAT))
_text, _text_others, _text_none = _getters(CompletionRequest, (*_PLAIN, *_OF_TEXT))


class Specs:
    """Of one model. Safe to use from several threads: at worst something is worked out twice."""

    __slots__ = ("_card", "_defaults", "_known")

    def __init__(self, card: ModelCard, defaults: Defaults):
        self._card, self._defaults = card, defaults
        self._known: dict[tuple[object, ...], GenerationSpec] = {}

    def chat(self, request: ChatCompletionRequest, *, steering: bool) -> GenerationSpec:
        """Return what `mapping.chat_spec` says. Raises as it does."""
        if _chat_others(request) != _chat_none:
            return chat_spec(request, self._card, self._defaults, steering=steering)
        key = ("chat", steering, *_chat(request))
        found = self._known.get(key)
        if found is None:
            found = self._kept(key, chat_spec(request, self._card, self._defaults, steering=steering))
        return found

    def completion(self, request: CompletionRequest, *, steering: bool) -> GenerationSpec:
        """Return what `mapping.completion_spec` says. Raises as it does."""
        if type(request.prompt) is not str or _text_others(request) != _text_none:
            return completion_spec(request, self._card, self._defaults, steering=steering)
        key = ("text", steering, *_text(request))
        found = self._known.get(key)
        if found is None:
            found = self._kept(key, completion_spec(request, self._card, self._defaults, steering=steering))
        return found

    def _kept(self, key: tuple[object, ...], spec: GenerationSpec) -> GenerationSpec:
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[key] = spec
        return spec
