"""Bytes of an HTTP body in, a checked request out, or an `InvalidRequest` that names the field and the remedy.

Three steps: decode into the typed request (types and ranges, in C), look at which fields were given
(unknown ones are ignored as OpenAI's servers do, unless they look misspelt or would change the answer),
and apply the rules that relate given fields to each other. Only given fields cost anything.
Must never apply a model's defaults or look at what an engine can do: that is `mapping`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import msgspec

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.openai import rules
from holdfast.openai.explain import explain, missing_field
from holdfast.openai.nearmiss import nearest
from holdfast.openai.types import ChatCompletionRequest, CommonRequest, CompletionRequest

R = TypeVar("R", bound=CommonRequest)

_UNKNOWN_FIELDS = 64
"""More unknown fields than this are refused instead of being compared with the known ones."""

_IGNORED = frozenset(
    {
        "audio", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "verbosity", "guided_decoding_backend", "request_id", "extra_headers",
    }
)  # fmt: skip
"""Fields that OpenAI or vLLM define and whose absence here changes no token; kept to spot near misses."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "web_search_options": (),
    "moderation": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "guided_whitespace_pattern": (),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
    "spaces_between_special_tokens": (True,),
    "typical_p": (1,),
    "min_k": (),
    "top_a": (0,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "no_repeat_ngram_size": (0,),
    "lora_path": (),
}
"""Fields of other servers that would change the answer: refused unless null or one of these values."""

_REPLACED = {
    "functions": "Use 'tools' instead.",
    "function_call": "Use 'tool_choice' instead.",
}
"""Deprecated fields, and what replaces them."""


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """Return the chat request in this body.

    Raises:
        InvalidRequest: malformed JSON or UTF-8, a wrong type, a value out of range, a contradiction, a
            misspelt field; ``param`` names the field.
        UnsupportedFeature: a valid option that no engine of ours can do.
    """
    return _parse(body, _CHAT)


def parse_completion(body: bytes) -> CompletionRequest:
    """Return the text completion request in this body. Raises as `parse_chat`."""
    return _parse(body, _TEXT)


class _Surface(Generic[R]):
    """One route: its decoder, its fields with their rules, and the field that gives away the other route."""

    __slots__ = ("checks", "decode", "foreign", "known")

    def __init__(
        self,
        kind: type[R],
        checks: dict[str, Callable[[R], None]],
        foreign: dict[str, str],
    ):
        self.decode: Callable[[bytes], R] = msgspec.json.Decoder(kind).decode
        self.checks: dict[str, Callable[[R], None] | None] = dict.fromkeys(kind.__struct_fields__)
        self.checks.update(checks)
        self.checks.update(dict.fromkeys(_IGNORED))
        self.known = frozenset([*self.checks, *_NEUTRAL, *_REPLACED])
        self.foreign = foreign


_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _parse(body: bytes, surface: _Surface[R]) -> R:
    try:
        request = surface.decode(body)
        given = _keys(body)
    except (ValueError, RecursionError) as error:
        raise _explained(error, body, surface) from None
    checks = surface.checks
    unknown: list[str] | None = None
    for key in given:
        try:
            check = checks[key]
        except KeyError:
            unknown = unknown or []
            unknown.append(key)
            continue
        if check is not None:
            check(request)
    if unknown:
        _judge_unknown(unknown, given, surface)
    return request


def _explained(error: Exception, body: bytes, surface: _Surface[R]) -> InvalidRequest:
    missing = missing_field(error)
    if missing is None:
        return explain(error, body)
    try:
        given = _keys(body)
    except (ValueError, RecursionError) as worse:
        return explain(worse, body)
    for key in given:
        if key in surface.foreign and missing in ("messages", "prompt"):
            return InvalidRequest(surface.foreign[key], param=key)
        if key not in surface.known and nearest(key, surface.known) == missing:
            return _misspelt(key, missing)
    return explain(error, body)


def _misspelt(key: str, meant: str) -> InvalidRequest:
    return InvalidRequest(f"There is no field '{key}'; did you mean '{meant}'?", param=key)


def _judge_unknown(unknown: Iterable[str], given: dict[str, msgspec.Raw], surface: _Surface[R]) -> None:
    """Raise for unknown fields that are misspelt, belong to another route or would change the answer."""
    for count, key in enumerate(unknown):
        if count >= _UNKNOWN_FIELDS:
            raise InvalidRequest(
                f"The request has over {_UNKNOWN_FIELDS} unknown fields; send only documented ones (see /docs)."
            )
        if key in _NEUTRAL or key in _REPLACED:
            _refuse_unless_neutral(key, given[key])
        elif key in surface.foreign:
            raise InvalidRequest(surface.foreign[key], param=key)
        else:
            meant = nearest(key, surface.known)
            if meant is not None:
                raise _misspelt(key, meant)


def _refuse_unless_neutral(key: str, raw: msgspec.Raw) -> None:
    value = msgspec.json.decode(raw)
    if value is None or value in _NEUTRAL.get(key, ()):
        return
    message = f"'{key}' is deprecated and not supported." if key in _REPLACED else f"'{key}' is not supported here."
    raise UnsupportedFeature(" ".join([message, _REPLACED.get(key, "")]).strip(), param=key)


_COMMON: dict[str, Callable[[Any], None]] = {
    "stream_options": rules.check_stream_options,
    "stop": rules.check_stop,
    "min_tokens": rules.check_min_tokens,
    "nvext": rules.check_nvext,
}
_CHAT: _Surface[ChatCompletionRequest] = _Surface(
    ChatCompletionRequest,
    {
        **_COMMON,
        "messages": rules.check_messages,
        "max_completion_tokens": rules.check_max_completion_tokens,
        "top_logprobs": rules.check_top_logprobs,
        "tools": rules.check_tools,
        "tool_choice": rules.check_tool_choice,
        "chat_template_args": rules.check_template_kwargs,
    },
    {
        "prompt": "'prompt' belongs to /v1/completions; send 'messages' here.",
        "input": "'input' belongs to /v1/responses; send 'messages' here.",
        "echo": "'echo' belongs to /v1/completions; leave it out here.",
        "suffix": "'suffix' belongs to /v1/completions; leave it out here.",
        "best_of": "'best_of' belongs to /v1/completions; use 'n' here.",
    },
)
_TEXT: _Surface[CompletionRequest] = _Surface(
    CompletionRequest,
    {
        **_COMMON,
        "prompt": rules.check_prompt,
        "best_of": rules.check_best_of,
        "suffix": rules.check_suffix,
        "echo": rules.check_echo,
    },
    {
        "messages": "'messages' belongs to /v1/chat/completions; send 'prompt' here.",
        "tools": "'tools' belongs to /v1/chat/completions.",
        "tool_choice": "'tool_choice' belongs to /v1/chat/completions.",
        "top_logprobs": "'top_logprobs' belongs to /v1/chat/completions; here 'logprobs' is the count.",
        "max_completion_tokens": "'max_completion_tokens' belongs to /v1/chat/completions; use 'max_tokens' here.",
    },
)
