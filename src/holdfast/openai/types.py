"""Requests of the OpenAI HTTP API, plus the sampling keys that engines add and NVIDIA Dynamo's ``nvext``.

Types and ranges live in the annotations, so the decoder enforces them and the OpenAPI document shows
them; rules that relate fields to each other are in `parse`. Every optional field accepts ``null`` as "not
given", as OpenAI's servers do. Must never hold a default that changes generation: that is `mapping`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from holdfast.base import limits
from holdfast.openai.messages import Message

TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
StrictPriority = Annotated[int, Meta(ge=0, le=2**32 - 1)]
StopString = Annotated[str, Meta(max_length=limits.STOP_STRING_CHARS)]
WorkerId = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(max_length=64)]


class StreamOptions(msgspec.Struct, gc=False, frozen=True):
    """Options of a stream. Obfuscation is never added, so ``include_obfuscation`` changes nothing."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class FunctionDefinition(msgspec.Struct, omit_defaults=True, gc=False):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, tag_field="type", tag="function", gc=False):
    """A tool of type ``function``."""

    function: FunctionDefinition


class CustomTool(msgspec.Struct, tag_field="type", tag="custom", gc=False):
    """A tool with free-form input; understood and refused."""

    custom: dict[str, Any]


class FunctionName(msgspec.Struct, gc=False):
    """Names a function."""

    name: str


class NamedToolChoice(msgspec.Struct, tag_field="type", tag="function", gc=False):
    """Forces a call of one function."""

    function: FunctionName


class AllowedFunction(msgspec.Struct, gc=False):
    """One entry of a list of allowed tools."""

    function: FunctionName
    type: Literal["function"] = "function"


class AllowedTools(msgspec.Struct, gc=False):
    """A subset of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[AllowedFunction]


class AllowedToolChoice(msgspec.Struct, tag_field="type", tag="allowed_tools", gc=False):
    """Restricts the choice to a subset of the tools."""

    allowed_tools: AllowedTools


class CustomToolChoice(msgspec.Struct, tag_field="type", tag="custom", gc=False):
    """Forces a custom tool; understood and refused."""

    custom: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolChoice | CustomToolChoice


class TextFormat(msgspec.Struct, tag_field="type", tag="text", gc=False):
    """Plain text: no constraint."""


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object", gc=False):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, gc=False):
    """A named JSON schema."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema", gc=False):
    """JSON that follows a schema."""

    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(msgspec.Struct, gc=False):
    """vLLM's newer spelling of the ``guided_*`` keys; exactly one may be set."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class AgentHints(msgspec.Struct, gc=False):
    """Hints of an agent framework. ``osl``: expected output length in tokens."""

    priority: Priority | None = None
    strict_priority: StrictPriority | None = None
    osl: StrictPriority | None = None
    speculative_prefill: bool | None = None
    latency_sensitivity: float | None = None


class SessionControl(msgspec.Struct, gc=False):
    """Binds requests of one session together; advisory. ``timeout``: seconds."""

    session_id: Annotated[str, Meta(min_length=1, max_length=limits.REQUEST_LABEL_CHARS)]
    action: Literal["bind", "open", "close"] | None = None
    timeout: Annotated[float, Meta(ge=0)] | None = None


class NvExt(msgspec.Struct, gc=False):
    """NVIDIA Dynamo's request extension. Fields that it defines and Holdfast can't do are refused by `parse`."""

    greed_sampling: bool | None = None
    use_raw_prompt: bool | None = None
    annotations: list[str] | None = None
    backend_instance_id: WorkerId | None = None
    token_data: list[TokenId] | None = None
    max_thinking_tokens: TokenCount | None = None
    extra_fields: list[str] | None = None
    prefill_worker_id: WorkerId | None = None
    decode_worker_id: WorkerId | None = None
    agent_context: dict[str, Any] | None = None
    agent_hints: AgentHints | None = None
    session_control: SessionControl | None = None
    cache_salt: str | None = None
    router: dict[str, Any] | None = None


class CommonRequest(msgspec.Struct, kw_only=True, gc=False):
    """What chat and text completions have in common."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=limits.CHOICES_PER_REQUEST)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=limits.STOP_STRINGS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=limits.LOGIT_BIAS_ENTRIES)] | None = None
    max_tokens: TokenCount | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    response_format: ResponseFormat | None = None
    # what engines add to the API
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1)] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Priority | None = None
    cache_salt: str | None = None
    nvext: NvExt | None = None


class ChatCompletionRequest(CommonRequest, kw_only=True, gc=False):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    tools: Annotated[list[FunctionTool | CustomTool], Meta(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    max_completion_tokens: TokenCount | None = None
    reasoning_effort: Annotated[str, Meta(max_length=32)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template_args: dict[str, Any] | None = None


class CompletionRequest(CommonRequest, kw_only=True, gc=False):
    """Body of ``POST /v1/completions``. A list of prompts yields ``n`` choices for each, in order."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=limits.CHOICES_PER_REQUEST)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
