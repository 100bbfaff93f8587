"""The shapes of every answer, for the OpenAPI document and for whoever reads answers back.

`encode` writes these shapes directly as bytes; tests hold the two together. Must never be used on the
token path.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
Join = Literal["none", "exact", "declared"]
"""``none``: one attempt, nothing was joined; ``exact``: joined, and token for token as without the failure;
``declared``: joined without gap or repeat, but sampling after the join may differ from an undisturbed run."""


class Migration(msgspec.Struct, frozen=True, omit_defaults=True):
    """One move of a stream to another worker."""

    cause: str
    """Code of the error that ended the attempt."""
    at: int
    """Output index of the first token of the new attempt."""
    gap_ms: int = 0
    """Time between the last token of the old attempt and the first of the new one."""
    choice: int = 0


class Continuity(msgspec.Struct, frozen=True):
    """The extension field ``holdfast``: how the answer came about."""

    attempts: int = 1
    join: Join = "none"
    migrations: tuple[Migration, ...] = ()


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """``cached_tokens``: prompt tokens that came from the prefix cache."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """``reasoning_tokens``: generated tokens that were reasoning."""

    reasoning_tokens: int = 0


class CompletionUsage(msgspec.Struct, frozen=True):
    """Token counts of the whole request, over all choices and attempts; nothing is counted twice."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(msgspec.Struct, frozen=True):
    """The generated token at a position, and the most likely ones."""

    token: str
    logprob: float
    top_logprobs: list[TopLogprob]
    bytes: list[int] | None = None


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of the tokens of the content."""

    content: list[TokenLogprob] | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities in the legacy form. ``text_offset``: characters from the start of the text. Null: unknown."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class ToolCallFunction(msgspec.Struct, frozen=True):
    """``arguments``: JSON text as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the model wants made."""

    id: str
    function: ToolCallFunction
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """The model's answer. ``content`` is null when there are only tool calls."""

    role: Annotated[Literal["assistant"], Meta(description="Always 'assistant'.")]
    content: str | None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None


class ChatCompletionChoice(msgspec.Struct, frozen=True):
    """One of ``n`` answers."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """A chat completion that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionChoice]
    usage: CompletionUsage
    system_fingerprint: str | None = None
    holdfast: Continuity | None = None
    nvext: dict[str, Any] | None = None


class FunctionDelta(msgspec.Struct, frozen=True):
    """``arguments``: the next piece of JSON text."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A piece of a tool call; ``id``, ``type`` and the name come in its first piece."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None


class ChatDelta(msgspec.Struct, frozen=True):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """What a chunk adds to one of ``n`` answers."""

    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """One event of a chat stream. ``holdfast`` comes with each choice's last chunk."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str | None = None
    usage: CompletionUsage | None = None
    holdfast: Continuity | None = None
    nvext: dict[str, Any] | None = None


class CompletionChoice(msgspec.Struct, frozen=True):
    """One answer, or in a stream what a chunk adds to it."""

    index: int
    text: str
    finish_reason: Literal["stop", "length", "content_filter"] | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(msgspec.Struct, frozen=True):
    """A text completion, or one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | None = None
    usage: CompletionUsage | None = None
    holdfast: Continuity | None = None
    nvext: dict[str, Any] | None = None


class Model(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that is served. ``max_model_len``: its context length in tokens."""

    id: str
    object: Annotated[Literal["model"], Meta(description="Always 'model'.")]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True):
    """The models that are served."""

    object: Literal["list"]
    data: list[Model]


class ErrorDetail(msgspec.Struct, frozen=True):
    """``code`` is stable; ``message`` says what happened and what to do; ``param`` names the field at fault."""

    message: str
    type: str
    code: str
    param: str | None = None
    details: dict[str, Any] | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """Every error, as an HTTP body or as an event of a stream."""

    error: ErrorDetail
