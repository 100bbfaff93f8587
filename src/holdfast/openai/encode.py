"""Answers as bytes: server-sent events of streams, and whole answers.

The hot path is one content event per stream and engine step: two precomputed byte strings around a
*fragment*, which is text that is already escaped for JSON and has no quotes (`escape`, or the text tables).
Everything constant over a stream is built once, at its start. Must never wait, and never hold a stream's state
beyond its constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import msgspec

from holdfast.models.card import ModelCard
from holdfast.openai.responses import (
    ChatMessage,
    CompletionTokensDetails,
    CompletionUsage,
    Continuity,
    FinishReason,
    Migration,
    Model,
    ModelList,
    PromptTokensDetails,
    ToolCall,
)

DONE = b"data: [DONE]\n\n"
"""Ends every stream, also one that ended with an error event."""

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it, proxies see traffic."""

UNDISTURBED = Continuity()
"""One attempt, no join."""

_encode = msgspec.json.Encoder(enc_hook=str).encode
_UNDISTURBED_FIELD = b',"holdfast":' + _encode(UNDISTURBED)


def escape(text: str) -> bytes:
    """Return text as a fragment: escaped for JSON, without quotes."""
    return _encode(text)[1:-1]


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> CompletionUsage:
    """Return token counts of a request; ``prompt`` counts each prompt once, ``completion`` sums all choices."""
    return CompletionUsage(
        prompt, completion, prompt + completion, PromptTokensDetails(cached), CompletionTokensDetails(reasoning)
    )


class _StreamEncoder:
    """What both kinds of stream share: everything around a choice, its end, and usage."""

    __slots__ = ("_choice", "_head", "_tail", "content_prefix", "content_suffix", "index")

    _KIND = (b"", b"")
    """Prefix of the id, and ``object``."""
    _CONTENT = (b"", b"")
    """What stands before and after a fragment, inside a choice."""
    _END = b""
    """What stands in a choice that adds nothing."""

    def __init__(
        self,
        request_id: str,
        created: int,
        model: str,
        *,
        fingerprint: str = "",
        index: int = 0,
        include_usage: bool = False,
    ):
        self._head = b"data: " + _head(self._KIND, request_id, created, model, fingerprint)
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._set_index(index)

    def _set_index(self, index: int) -> None:
        before, after = self._CONTENT
        self.index = index
        self._choice = b'%b"choices":[{"index":%d,' % (self._head, index)
        self.content_prefix = self._choice + before
        self.content_suffix = b'%b,"finish_reason":null}]%b' % (after, self._tail)

    def choice(self, index: int) -> Self:
        """Return the encoder of another choice of the same answer."""
        other = object.__new__(type(self))
        other._head, other._tail = self._head, self._tail
        other._set_index(index)
        return other

    def content(self, fragment: bytes) -> bytes:
        """Return the event that adds this fragment. Callers in a hurry join prefix, fragment and suffix themselves."""
        return b"%b%b%b" % (self.content_prefix, fragment, self.content_suffix)

    def _with_logprobs(self, fragment: bytes, logprobs: bytes) -> bytes:
        after = self._CONTENT[1]
        return b'%b%b%b,"logprobs":%b,"finish_reason":null}]%b' % (
            self.content_prefix, fragment, after, logprobs, self._tail,
        )  # fmt: skip

    def finish(
        self, reason: FinishReason, continuity: Continuity = UNDISTURBED, nvext: Mapping[str, Any] | None = None
    ) -> bytes:
        """Return the last event of this choice, with the extension field ``holdfast``."""
        return b'%b%b,"finish_reason":"%b"}]%b%b' % (
            self._choice, self._END, reason.encode(), _extensions(continuity, nvext), self._tail,
        )  # fmt: skip

    def usage(self, counts: CompletionUsage) -> bytes:
        """Return the event after the last choice's end that carries usage (``stream_options.include_usage``)."""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._head, _encode(counts))


class ChatStreamEncoder(_StreamEncoder):
    """Writes the events of one choice of a chat stream.

    Args:
        request_id: ours; the answer's id is ``chatcmpl-<request id>``.
        created: Unix time in seconds, the same over the whole stream.
        model: the name by which the client asked for it.
        fingerprint: of the model card, becomes ``system_fingerprint``.
        index: of the choice.
        include_usage: the client asked for usage; all events but the last then say ``"usage": null``.
    """

    __slots__ = ()

    _KIND = (b"chatcmpl-", b"chat.completion.chunk")
    _CONTENT = (b'"delta":{"content":"', b'"}')
    _END = b'"delta":{}'

    def role(self) -> bytes:
        """Return the first event, which says who speaks."""
        return self._delta(b'"role":"assistant","content":""')

    def content_logprobs(self, fragment: bytes, entries: bytes) -> bytes:
        """Return a content event with log probabilities (`logprobs.TokenNames.chat_entries`)."""
        return self._with_logprobs(fragment, b'{"content":[%b]}' % entries)

    def reasoning(self, fragment: bytes) -> bytes:
        """Return the event that adds to ``reasoning_content``."""
        return self._delta(b'"reasoning_content":"%b"' % fragment)

    def tool_call(self, position: int, call_id: str, name: str, arguments: bytes = b"") -> bytes:
        """Return the event that begins the tool call at this position; ``arguments`` is a fragment."""
        return self._delta(
            b'"tool_calls":[{"index":%d,"id":%b,"type":"function","function":{"name":%b,"arguments":"%b"}}]'
            % (position, _encode(call_id), _encode(name), arguments)
        )

    def tool_arguments(self, position: int, fragment: bytes) -> bytes:
        """Return the event that adds to the arguments of the tool call at this position."""
        return self._delta(b'"tool_calls":[{"index":%d,"function":{"arguments":"%b"}}]' % (position, fragment))

    def _delta(self, fields: bytes) -> bytes:
        return b'%b"delta":{%b},"finish_reason":null}]%b' % (self._choice, fields, self._tail)


class CompletionStreamEncoder(_StreamEncoder):
    """Writes the events of one choice of a text completion; arguments as `ChatStreamEncoder`, id ``cmpl-…``."""

    __slots__ = ()

    _KIND = (b"cmpl-", b"text_completion")
    _CONTENT = (b'"text":"', b'"')
    _END = b'"text":""'

    def content_logprobs(self, fragment: bytes, logprobs: bytes) -> bytes:
        """Return a content event with log probabilities (`logprobs.LegacyLogprobs.piece`)."""
        return self._with_logprobs(fragment, logprobs)


def _head(kind: tuple[bytes, bytes], request_id: str, created: int, model: str, fingerprint: str) -> bytes:
    """Return the opening of an answer, up to and without ``choices``. ``kind``: prefix of the id, and the object."""
    return b'{"id":"%b%b","object":"%b","created":%d,%b,' % (
        kind[0], request_id.encode(), kind[1], created, _named(model, fingerprint),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _named(model: str, fingerprint: str) -> bytes:
    """Return the fields that say what answers; a process has few models, under few names."""
    named = b',"system_fingerprint":%b' % _encode(fingerprint) if fingerprint else b""
    return b'"model":%b%b' % (_encode(model), named)


def _extensions(continuity: Continuity, nvext: Mapping[str, Any] | None) -> bytes:
    field = _UNDISTURBED_FIELD if continuity is UNDISTURBED else b',"holdfast":' + _encode(continuity)
    return field if nvext is None else field + b',"nvext":' + _encode(nvext)


class ChatChoice(msgspec.Struct, frozen=True):
    """A finished choice of a chat completion. ``logprobs``: `TokenNames.chat_entries` of all its tokens."""

    index: int
    text: str
    finish_reason: FinishReason
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: bytes | None = None
    continuity: Continuity = UNDISTURBED


class TextChoice(msgspec.Struct, frozen=True):
    """A finished choice of a text completion. ``logprobs``: `LegacyLogprobs.piece` of all its tokens."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: bytes | None = None
    continuity: Continuity = UNDISTURBED


def chat_completion(
    request_id: str,
    created: int,
    model: str,
    choices: Sequence[ChatChoice],
    counts: CompletionUsage,
    *,
    fingerprint: str = "",
    nvext: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the body of a chat completion that is not streamed; arguments as `ChatStreamEncoder`."""
    head = _head((b"chatcmpl-", b"chat.completion"), request_id, created, model, fingerprint)
    return _whole(head, [_chat_choice(choice) for choice in choices], choices, counts, nvext)


def completion(
    request_id: str,
    created: int,
    model: str,
    choices: Sequence[TextChoice],
    counts: CompletionUsage,
    *,
    fingerprint: str = "",
    nvext: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the body of a text completion that is not streamed; arguments as `ChatStreamEncoder`."""
    head = _head((b"cmpl-", b"text_completion"), request_id, created, model, fingerprint)
    return _whole(head, [_text_choice(choice) for choice in choices], choices, counts, nvext)


def _whole(
    head: bytes,
    encoded: Sequence[bytes],
    choices: Sequence[ChatChoice] | Sequence[TextChoice],
    counts: CompletionUsage,
    nvext: Mapping[str, Any] | None,
) -> bytes:
    continuity = merged([(choice.index, choice.continuity) for choice in choices])
    return b'%b"choices":[%b],"usage":%b%b}' % (
        head, b",".join(encoded), _encode(counts), _extensions(continuity, nvext),
    )  # fmt: skip


def _chat_choice(choice: ChatChoice) -> bytes:
    message = ChatMessage(
        role="assistant",
        content=None if choice.tool_calls and not choice.text else choice.text,
        reasoning_content=choice.reasoning,
        tool_calls=choice.tool_calls or None,
    )
    logprobs = b"null" if choice.logprobs is None else b'{"content":[%b]}' % choice.logprobs
    return b'{"index":%d,"message":%b,"logprobs":%b,"finish_reason":"%b"}' % (
        choice.index, _encode(message), logprobs, choice.finish_reason.encode(),
    )  # fmt: skip


def _text_choice(choice: TextChoice) -> bytes:
    logprobs = b"null" if choice.logprobs is None else choice.logprobs
    return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":"%b"}' % (
        choice.index, _encode(choice.text), logprobs, choice.finish_reason.encode(),
    )  # fmt: skip


def merged(parts: Sequence[tuple[int, Continuity]]) -> Continuity:
    """Return what happened over all choices: most attempts, the weakest join, every migration with its choice."""
    if all(continuity is UNDISTURBED for _, continuity in parts):
        return UNDISTURBED
    joins = {continuity.join for _, continuity in parts}
    migrations: list[Migration] = []
    for index, continuity in parts:
        migrations += [msgspec.structs.replace(migration, choice=index) for migration in continuity.migrations]
    return Continuity(
        attempts=max(continuity.attempts for _, continuity in parts),
        join="declared" if "declared" in joins else "exact" if "exact" in joins else "none",
        migrations=tuple(migrations),
    )


def model_objects(card: ModelCard, created: int) -> list[Model]:
    """Return the model and each of its aliases. ``created``: Unix time in seconds since when it is served."""
    return [
        Model(name, "model", created, "holdfast", card.name, card.base_model, card.context_length)
        for name in (card.name, *card.aliases)
    ]


def models_list(cards: Sequence[tuple[ModelCard, int]]) -> bytes:
    """Return the body of ``GET /v1/models``, sorted by name, each name once. Cards come with ``created``."""
    found = {model.id: model for card, created in cards for model in model_objects(card, created)}
    return _encode(ModelList("list", [found[name] for name in sorted(found)]))


def model_object(card: ModelCard, created: int, name: str | None = None) -> bytes:
    """Return the body of ``GET /v1/models/{name}``; ``name`` may be one of the card's aliases."""
    models = model_objects(card, created)
    return _encode(next((model for model in models if model.id == name), models[0]))
