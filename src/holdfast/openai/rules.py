"""Rules that single fields and fields between each other keep, beyond types and ranges.

Each function looks at one field that the client gave (`parse` calls it only then), and raises an error
that names it and the remedy. Must never read anything but the request.
"""

from __future__ import annotations

from holdfast.base import limits
from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.openai.messages import AssistantMessage, Message
from holdfast.openai.types import (
    ChatCompletionRequest,
    CommonRequest,
    CompletionRequest,
    CustomTool,
    CustomToolChoice,
    FunctionTool,
    NamedToolChoice,
)


def check_stream_options(request: CommonRequest) -> None:
    """Stream options need a stream."""
    options = request.stream_options
    if options is None:
        return
    if not request.stream:
        raise InvalidRequest(
            "'stream_options' needs 'stream': true; set it or leave the options out.", param="stream_options"
        )
    if options.continuous_usage_stats:
        raise UnsupportedFeature(
            "'stream_options.continuous_usage_stats' is not supported; 'include_usage' sends usage once at the end.",
            param="stream_options.continuous_usage_stats",
        )


def check_stop(request: CommonRequest) -> None:
    """An empty stop string matches everywhere."""
    stop = request.stop
    if stop == "" or (isinstance(stop, list) and "" in stop):
        raise InvalidRequest("'stop' must not hold an empty string; it would end every answer at once.", param="stop")


def check_min_tokens(request: CommonRequest) -> None:
    """The least may not be over the most."""
    most = getattr(request, "max_completion_tokens", None) or request.max_tokens
    if request.min_tokens is not None and most is not None and request.min_tokens > most:
        raise InvalidRequest(
            f"'min_tokens' ({request.min_tokens}) is over the most tokens allowed ({most}); "
            "lower it or raise 'max_tokens'.",
            param="min_tokens",
        )


_ANNOTATIONS = frozenset({"formatted_prompt", "token_ids", "llm_metrics", "backend_error"})


def check_nvext(request: CommonRequest) -> None:
    """Refuse what the extension defines and nothing here can do."""
    ext = request.nvext
    if ext is None:
        return
    if ext.max_thinking_tokens is not None:
        raise UnsupportedFeature("'nvext.max_thinking_tokens' is not supported.", param="nvext.max_thinking_tokens")
    for i, name in enumerate(ext.annotations or ()):
        if name not in _ANNOTATIONS:
            raise UnsupportedFeature(
                f"'nvext.annotations[{i}]' is not one of {', '.join(sorted(_ANNOTATIONS))}.",
                param=f"nvext.annotations[{i}]",
            )
    if ext.token_data is not None and not ext.token_data:
        raise InvalidRequest("'nvext.token_data' is empty; send token ids or leave it out.", param="nvext.token_data")


def check_max_completion_tokens(request: ChatCompletionRequest) -> None:
    """The old and the new name of the limit must agree."""
    newer, older = request.max_completion_tokens, request.max_tokens
    if newer is not None and older is not None and newer != older:
        raise InvalidRequest(
            f"'max_tokens' ({older}) and 'max_completion_tokens' ({newer}) contradict each other; "
            "send only 'max_completion_tokens'.",
            param="max_tokens",
        )


def check_top_logprobs(request: ChatCompletionRequest) -> None:
    """Alternatives need log probabilities."""
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest(
            "'top_logprobs' needs 'logprobs': true; set it or leave 'top_logprobs' out.", param="top_logprobs"
        )


def check_tools(request: ChatCompletionRequest) -> None:
    """Only functions, with usable and distinct names."""
    seen: set[str] = set()
    for i, tool in enumerate(request.tools or ()):
        if isinstance(tool, CustomTool):
            raise UnsupportedFeature(
                "Tools of type 'custom' are not supported; use 'function'.", param=f"tools[{i}].type"
            )
        name = tool.function.name
        if not name.isprintable() or any(c in name for c in " \"'<>{}"):
            raise InvalidRequest(
                f"'tools[{i}].function.name' must be letters, digits, '_', '-', '.', ':' or '/'.",
                param=f"tools[{i}].function.name",
            )
        if name in seen:
            raise InvalidRequest(
                f"'tools' holds two functions of one name (the second is tools[{i}]); rename one.",
                param=f"tools[{i}].function.name",
            )
        seen.add(name)


def check_tool_choice(request: ChatCompletionRequest) -> None:
    """A forced or restricted choice must name tools that were sent."""
    choice = request.tool_choice
    if choice is None or choice in ("none", "auto"):
        return
    if isinstance(choice, CustomToolChoice):
        raise UnsupportedFeature("Tools of type 'custom' are not supported; use 'function'.", param="tool_choice.type")
    if not request.tools:
        raise InvalidRequest("'tool_choice' needs 'tools'; send the functions that may be called.", param="tool_choice")
    if isinstance(choice, str):
        return
    names = {tool.function.name for tool in request.tools if isinstance(tool, FunctionTool)}
    if isinstance(choice, NamedToolChoice):
        wanted, param = [choice.function.name], "tool_choice.function.name"
    else:
        wanted, param = [t.function.name for t in choice.allowed_tools.tools], "tool_choice.allowed_tools.tools"
    missing = [name for name in wanted if name not in names]
    if missing or not wanted:
        raise InvalidRequest(
            "'tool_choice' names a function that is not in 'tools'; send it there or correct the name.", param=param
        )


def check_messages(request: ChatCompletionRequest) -> None:
    """Every message says something."""
    for i, message in enumerate(request.messages):
        if message.content is None or message.content == []:
            _no_content(i, message)


def _no_content(i: int, message: Message) -> None:
    if isinstance(message, AssistantMessage) and message.content is None:
        if message.tool_calls or message.function_call or message.refusal or message.reasoning_content:
            return
        raise InvalidRequest(
            f"'messages[{i}].content' is required when an assistant message has no 'tool_calls'.",
            param=f"messages[{i}].content",
        )
    if message.content == []:
        raise InvalidRequest(
            f"'messages[{i}].content' is an empty list; send a string or at least one part.",
            param=f"messages[{i}].content",
        )


def check_template_kwargs(request: ChatCompletionRequest) -> None:
    """Two spellings of one field."""
    if request.chat_template_kwargs is not None and request.chat_template_args is not None:
        raise InvalidRequest(
            "'chat_template_kwargs' and 'chat_template_args' mean the same; send only 'chat_template_kwargs'.",
            param="chat_template_args",
        )


def check_prompt(request: CompletionRequest) -> None:
    """One kind of prompt, none of them empty, not too many choices."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return
    kinds = set(map(type, prompt))
    if not kinds:
        raise InvalidRequest("'prompt' is an empty list; send at least one prompt.", param="prompt")
    if len(kinds) > 1:
        raise InvalidRequest("'prompt' mixes strings, token ids and lists; send a list of one kind.", param="prompt")
    if kinds == {list} and not all(prompt):
        raise InvalidRequest("'prompt' holds an empty list of token ids; send at least one id.", param="prompt")
    count = 1 if kinds == {int} else len(prompt)
    total = count * (request.n or 1)
    if total > limits.CHOICES_PER_REQUEST:
        raise InvalidRequest(
            f"{count} prompts with n={request.n or 1} make {total} choices; the limit is "
            f"{limits.CHOICES_PER_REQUEST}. Split the request.",
            param="prompt",
        )


def check_best_of(request: CompletionRequest) -> None:
    """Ranking is not done here."""
    best_of, n = request.best_of, request.n or 1
    if best_of is None or best_of == n:
        return
    if best_of < n:
        raise InvalidRequest(f"'best_of' ({best_of}) must be at least 'n' ({n}); leave it out.", param="best_of")
    raise UnsupportedFeature("'best_of' over 'n' is not supported; ask for 'n' choices and rank them.", param="best_of")


def check_suffix(request: CompletionRequest) -> None:
    """Filling in the middle is not done here."""
    if request.suffix:
        raise UnsupportedFeature(
            "'suffix' (filling in the middle) is not supported; write the model's own fill-in tokens into 'prompt'.",
            param="suffix",
        )


def check_echo(request: CompletionRequest) -> None:
    """There are no log probabilities of prompt tokens."""
    if request.echo and request.logprobs is not None:
        raise UnsupportedFeature(
            "'echo' together with 'logprobs' is not supported: no log probabilities of the prompt are computed.",
            param="echo",
        )
