"""From a request body to token ids and a specification: everything before the first worker is chosen.

Large bodies are parsed, templated and tokenized off the loop. Must never start anything.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import msgspec

from holdfast.base.limits import LARGE_BODY_BYTES
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.offload import Offload
from holdfast.frontend.registry import ModelRegistry, ServedModel
from holdfast.openai.mapping import GenerationSpec, chat_spec, completion_spec
from holdfast.openai.parse import parse_chat, parse_completion
from holdfast.openai.prompt import completion_prompts, raw_prompt, template_messages
from holdfast.openai.types import ChatCompletionRequest, CompletionRequest
from holdfast.text.tools import ToolFormat

Surface = Literal["chat_completions", "completions"]
"""The reference's names of the two routes in metrics."""
R = TypeVar("R")


class Prompt(msgspec.Struct, frozen=True):
    """One prompt: its ids and, where they came from text, the text."""

    ids: array[int]
    text: str


class Prepared(msgspec.Struct, frozen=True):
    """A request that could be started."""

    surface: Surface
    model: str
    """As the client named it."""
    served: ServedModel
    spec: GenerationSpec
    prompts: list[Prompt]
    tool_format: ToolFormat | None
    """How tool calls are looked for in the output; None: they are not."""
    split_reasoning: bool
    new_call_id: Callable[[], str]


class Preparer:
    """Prepares requests of both surfaces."""

    def __init__(self, config: FrontendConfig, registry: ModelRegistry, offload: Offload, rng: random.Random):
        """Create it.

        Raises:
            InvalidRequest: a parser that the configuration names does not exist.
        """
        self._registry = registry
        self._offload = offload
        self._rng = rng
        self._steering = config.trust_client_priority
        self._tool_parser = config.tool_call_parser
        self._split_reasoning = config.reasoning_parser != "none"

    async def prepare(self, surface: Surface, body: bytes) -> Prepared:
        """Return the prepared request.

        Raises:
            InvalidRequest: with the field at fault and what to do.
            NoWorkers, CapacityExhausted: it is not the client's fault.
        """
        large = len(body) > LARGE_BODY_BYTES
        parse: Callable[[bytes], Any] = parse_chat if surface == "chat_completions" else parse_completion
        request = await self._offload.run(parse, body) if large else parse(body)
        served = await self._registry.get(request.model)
        build = self._chat if surface == "chat_completions" else self._completion
        if large:
            spec, prompts = await self._offload.run(build, request, served)
        else:
            spec, prompts = build(request, served)
        return Prepared(
            surface,
            request.model,
            served,
            spec,
            prompts,
            self._tool_format(served, spec),
            self._split_reasoning,
            self._new_call_id,
        )

    def _tool_format(self, served: ServedModel, spec: GenerationSpec) -> ToolFormat | None:
        if spec.tools.mode == "none" or self._tool_parser == "none":
            return None
        if spec.tools.mode == "forced":
            return "llama3_json"
        return self._tool_parser if self._tool_parser != "auto" else served.text.tool_format or "hermes"

    def _new_call_id(self) -> str:
        return f"call_{self._rng.getrandbits(96):024x}"

    def _chat(self, request: ChatCompletionRequest, served: ServedModel) -> tuple[GenerationSpec, list[Prompt]]:
        spec = chat_spec(request, served.card, served.defaults, steering=self._steering)
        if spec.prompt_ids:
            return spec, [Prompt(array("I", spec.prompt_ids), "")]
        if spec.raw_prompt:
            text = raw_prompt(request)
        else:
            tools = list(spec.tools.tools) or None
            text = served.text.template.render(
                template_messages(request.messages), tools=tools, add_generation_prompt=True, **spec.template_kwargs
            )
        return spec, [self._encode(served, text, add_special_tokens=False)]

    def _completion(self, request: CompletionRequest, served: ServedModel) -> tuple[GenerationSpec, list[Prompt]]:
        spec = completion_spec(request, served.card, served.defaults, steering=self._steering)
        if spec.prompt_ids:
            return spec, [Prompt(array("I", spec.prompt_ids), "")]
        prompts = []
        for prompt in completion_prompts(request):
            if isinstance(prompt, str):
                prompts.append(self._encode(served, prompt, add_special_tokens=True))
            else:
                text = served.text.tokenizer.decode(prompt, skip_special=False) if spec.echo else ""
                prompts.append(Prompt(array("I", prompt), text))
        return spec, prompts

    def _encode(self, served: ServedModel, text: str, *, add_special_tokens: bool) -> Prompt:
        ids = served.text.tokenizer.encode(
            text, add_special_tokens=add_special_tokens, max_tokens=served.card.context_length
        )
        return Prompt(ids, text)
