"""Chat templates: from messages to the prompt text that the model was trained on.

Templates come with the model and are Jinja programs, so they run in an immutable sandbox, with the additions
that Hugging Face's `apply_chat_template` documents: ``raise_exception``, ``strftime_now``, ``tojson`` without
ASCII escapes, loop controls and the ``generation`` tag. Must never put a message's text into an error or a log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.text.messages import normalise, with_objects

DEFAULT_TEMPLATE = """\
{%- if tools %}
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') }}
{{- 'You may call these functions:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools>\\nTo call one, answer with\\n<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (loop.first and tools and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""ChatML, for models that bring no template; tools in the Hermes format."""

_MARK = "\ue000\ue001continue here\ue001\ue000"
"""Put behind the final message to find where it ends in the rendered text."""


class _Objection(Exception):
    """What a template says through raise_exception."""


class _GenerationTag(Extension):
    """Accepts ``{% generation %}…{% endgeneration %}``, which marks training targets, and renders the inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the body as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise _Objection(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_DICT_ATTRIBUTES = frozenset(dir(dict))


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, with short cuts for what templates do all the time and what it would allow anyway."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return a dict's entry at once, where no attribute of dicts goes before it."""
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                pass
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as it is there
        """Call the template's own macros at once."""
        if type(__obj) is not Macro:
            return super().call(__context, __obj, *args, **kwargs)
        kwargs.pop("_block_vars", None)
        kwargs.pop("_loop_vars", None)
        odd = kwargs or __obj.catch_kwargs or __obj.catch_varargs or __obj.caller
        if odd or len(args) != len(__obj.arguments) or __context.eval_ctx.autoescape:
            return __obj(__context.eval_ctx, *args, **kwargs)
        return __obj._func(*args)  # noqa: SLF001 - all that is left of `Macro.__call__` then


def _environment(now: Callable[[], datetime] | None) -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    if now is not None:
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


class ChatTemplate:
    """One model's template, compiled once; a render costs single microseconds. Usable from any thread."""

    def __init__(
        self, source: str, bos_token: str = "", eos_token: str = "", *, now: Callable[[], datetime] | None = None
    ):
        """Compile it. A template that does not compile is refused when it is used, so that completions still work.

        Args:
            source: Jinja source; empty: `DEFAULT_TEMPLATE`.
            bos_token: begin-of-sequence piece, for templates that print it.
            eos_token: end-of-sequence piece.
            now: wall clock for ``strftime_now``; without it that function is undefined, as templates expect
                of older libraries.
        """
        self.source = source or DEFAULT_TEMPLATE
        self.is_default = not source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._keep_none = " none" in self.source.lower()
        self._broken = ""
        self.variables: frozenset[str] = frozenset()
        """Names that the template reads from its caller."""
        environment = _environment(now)
        try:
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(self.source)))
            self._template = environment.from_string(self.source)
            self._globals = dict(self._template.globals)  # each render copies them; a plain dict is quick
        except jinja2.TemplateSyntaxError as error:
            self._broken = f"line {error.lineno}: {error.message}"

    @property
    def uses_tools(self) -> bool:
        """Whether the template shows the model the tools it is given."""
        return "tools" in self.variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> str:
        """Return the prompt text.

        Args:
            messages: OpenAI chat messages; content as string or list of text parts.
            tools: OpenAI tool definitions.
            add_generation_prompt: whether the prompt ends with the opening of an assistant message.
            continue_final_message: whether the prompt ends inside the last message, for the model to go on.
            documents: passed to the template.
            chat_template_kwargs: a client's further variables (``enable_thinking`` …); cannot replace those above.
            **more: the same, for names that the caller chose itself (a client's might collide with arguments).

        Raises:
            InvalidRequest: the messages are malformed, or the template objects to them.
            UnsupportedFeature: parts that are not text; a template that does not compile.
        """
        shaped = normalise(messages, keep_none=self._keep_none)
        if not shaped:
            raise InvalidRequest("messages must not be empty.", param="messages")
        if continue_final_message:
            _mark_final(shaped, add_generation_prompt)
        if self._broken:
            raise UnsupportedFeature(
                f"This model's chat template does not compile ({self._broken}). "
                "Use /v1/completions, or give the worker another template."
            )
        variables = {
            **self._globals,
            **more,
            **(chat_template_kwargs or {}),
            **self._tokens,
            "messages": shaped,
            "tools": tools or None,
            "documents": documents or None,
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = self._first_that_renders(variables)
        return _cut_at_mark(rendered) if continue_final_message else rendered

    def _first_that_renders(self, variables: dict[str, Any]) -> str:
        """Try the usual conventions, then those of templates that glue arguments in as text or loop over any tools."""
        shaped = variables["messages"]
        variables["messages"] = with_objects(shaped)
        try:
            return self._run(variables)
        except InvalidRequest as error:
            if not isinstance(error.__cause__, TypeError):
                raise
            variables["messages"] = shaped
            try:
                return self._run({name: value for name, value in variables.items() if value is not None})
            except InvalidRequest:
                raise error from error.__cause__

    def _run(self, variables: dict[str, Any]) -> str:
        template = self._template
        # what `Template.new_context` makes, less what only templates that import others look at
        context = Context(template.environment, variables, template.name, template.blocks)
        try:
            return template.environment.concat(template.root_render_func(context))
        except _Objection as error:
            raise InvalidRequest(f"The model's chat template objects: {str(error)[:500]}", param="messages") from error
        except Exception as error:  # templates may fail in any way that Python can
            raise InvalidRequest(
                f"The model's chat template cannot render these messages: {_reason(error)}", param="messages"
            ) from error
        finally:
            context.vars.clear()  # macros hold their context: nothing is left to the garbage collector


def _reason(error: Exception) -> str:
    """Say what went wrong without quoting values, which may be message text."""
    if isinstance(error, jinja2.UndefinedError | jinja2.TemplateRuntimeError | TypeError):
        return f"{type(error).__name__}: {str(error)[:200]}."
    return f"{type(error).__name__}."


def _mark_final(messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other; set one of them to false.",
            param="continue_final_message",
        )
    messages[-1] = {**messages[-1], "content": (messages[-1]["content"] or "") + _MARK}


def _cut_at_mark(rendered: str) -> str:
    if rendered.count(_MARK) != 1:
        raise InvalidRequest(
            "The model's chat template does not show the final message exactly once, so it cannot be continued.",
            param="continue_final_message",
        )
    return rendered[: rendered.index(_MARK)]
