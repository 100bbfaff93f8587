"""From a request body to token ids and a specification: everything before the first worker is chosen.

Large bodies are parsed, templated and tokenized off the loop. Must never start anything.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec

from holdfast.base.limits import LARGE_BODY_BYTES
from holdfast.frontend.body import LargeBody
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.offload import Offload
from holdfast.frontend.registry import FILES_WAIT, ModelRegistry, ServedModel
from holdfast.openai.mapping import GenerationSpec
from holdfast.openai.parse import parse_chat, parse_completion
from holdfast.openai.prompt import completion_prompts, raw_prompt, template_messages
from holdfast.openai.types import ChatCompletionRequest, CompletionRequest
from holdfast.text.offload import LargeTextPool
from holdfast.text.tools import ToolFormat

Surface = Literal["chat_completions", "completions"]
"""The reference's names of the two routes in metrics."""

HUGE_TEXT_CHARS = 512 * 1024
"""Prompts over this are tokenized in a child process: even with the interpreter lock released, two of 20 MB
beside each other would hold up the event loop."""


class Prompt(msgspec.Struct, frozen=True):
    """One prompt: its ids and, where they came from text, the text."""

    ids: array[int]
    text: str


Source = str | Prompt
"""A prompt that is still text, or ids already."""
Read = tuple[GenerationSpec, list[Source], int]
"""What a body asks for, its prompts, and the nanoseconds that the chat template took; 0: there was none."""


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


def _no_clock() -> int:
    """Stand in where another thread works: it may have no clock to read."""
    return 0


def _parse(parse: Callable[[bytes], Any], body: bytes | LargeBody) -> Any:
    return parse(body.join() if isinstance(body, LargeBody) else body)


class Timing(NamedTuple):
    """Who wants to know how long the parts of preparing take."""

    clock: Callable[[], int]
    """A stopwatch, in nanoseconds; read on the event loop."""
    template: Callable[[float], None]
    """Told the seconds that the chat template took."""
    tokenize: Callable[[float], None]
    """Told the seconds that all prompts took. Of large bodies both include the wait for a helper."""


class Preparer:
    """Prepares requests of both surfaces."""

    def __init__(
        self, config: FrontendConfig, registry: ModelRegistry, offload: Offload, rng: random.Random, timing: Timing
    ):
        """Create it.

        Raises:
            InvalidRequest: a parser that the configuration names does not exist.
        """
        self._clock, self._template_took, self._tokenize_took = timing
        self._registry = registry
        self._offload = offload
        self._rng = rng
        self._steering = config.trust_client_priority
        self._tool_parser = config.tool_call_parser
        self._split_reasoning = config.reasoning_parser != "none"
        self._pool = LargeTextPool()

    def at_once(self, surface: Surface, body: bytes | LargeBody) -> Prepared | None:
        """Return the prepared request; None: it is large, or its model is not loaded, and `prepare` has to wait.

        Raises as `prepare`.
        """
        if isinstance(body, LargeBody) or len(body) > LARGE_BODY_BYTES:
            return None
        request = parse_chat(body) if surface == "chat_completions" else parse_completion(body)
        served = self._registry.ready(request.model)
        return None if served is None else self._small(surface, request, served)

    async def prepare(self, surface: Surface, body: bytes | LargeBody, wait: float = FILES_WAIT) -> Prepared:
        """Return the prepared request; ``wait``: seconds in which its model's files have to be there.

        Raises:
            InvalidRequest: with the field at fault and what to do.
            NoWorkers, CapacityExhausted: it is not the client's fault.
        """
        chat = surface == "chat_completions"
        parse: Callable[[bytes], Any] = parse_chat if chat else parse_completion
        if isinstance(body, LargeBody) and body.size <= LARGE_BODY_BYTES:
            body = body.join()
        large = isinstance(body, LargeBody) or len(body) > LARGE_BODY_BYTES
        request = await self._offload.run(_parse, parse, body) if large else _parse(parse, body)
        served = await self._registry.get(request.model, wait)
        if not large:
            return self._small(surface, request, served)
        read = self._chat if chat else self._completion
        came = self._clock()
        spec, sources, rendered = await self._offload.run(read, request, served, _no_clock)
        began = self._clock()
        prompts = [await self._encode_large(served, source, not chat, spec.cache_salt) for source in sources]
        self._told(sources, began - came if rendered else 0, began)
        return self._prepared(surface, request.model, served, spec, prompts)

    def _small(self, surface: Surface, request: Any, served: ServedModel) -> Prepared:
        chat = surface == "chat_completions"
        spec, sources, took = (self._chat if chat else self._completion)(request, served, self._clock)
        began = self._clock()
        prompts = [self._encode(served, source, not chat, spec.cache_salt) for source in sources]
        self._told(sources, took, began)
        return self._prepared(surface, request.model, served, spec, prompts)

    def _told(self, sources: list[Source], rendered: int, began: int) -> None:
        """Say how long the template took, in nanoseconds, and tokenizing, which ``began`` then."""
        if rendered:
            self._template_took(rendered / 1e9)
        if sources[0].__class__ is str:
            self._tokenize_took((self._clock() - began) / 1e9)

    def _prepared(
        self, surface: Surface, model: str, served: ServedModel, spec: GenerationSpec, prompts: list[Prompt]
    ) -> Prepared:
        return Prepared(
            surface,
            model,
            served,
            spec,
            prompts,
            self._tool_format(served, spec),
            self._split_reasoning,
            self._new_call_id,
        )

    async def close(self) -> None:
        """Stop the children that tokenize."""
        await self._pool.close()

    def _tool_format(self, served: ServedModel, spec: GenerationSpec) -> ToolFormat | None:
        if spec.tools.mode == "none" or self._tool_parser == "none":
            return None
        if spec.tools.mode == "forced":
            return "llama3_json"
        return self._tool_parser if self._tool_parser != "auto" else served.text.tool_format or "hermes"

    def _new_call_id(self) -> str:
        return f"call_{self._rng.getrandbits(96):024x}"

    def _chat(self, request: ChatCompletionRequest, served: ServedModel, clock: Callable[[], int]) -> Read:
        spec = served.specs.chat(request, steering=self._steering)
        if spec.prompt_ids:
            return spec, [Prompt(array("I", spec.prompt_ids), "")], 0
        if spec.raw_prompt:
            return spec, [raw_prompt(request)], 0
        began = clock()
        text = served.text.template.render(
            template_messages(request.messages),
            tools=list(spec.tools.tools) or None,
            add_generation_prompt=True,
            chat_template_kwargs=spec.template_kwargs,
        )
        return spec, [text], clock() - began or 1

    def _completion(self, request: CompletionRequest, served: ServedModel, _clock: Callable[[], int]) -> Read:
        spec = served.specs.completion(request, steering=self._steering)
        if spec.prompt_ids:
            return spec, [Prompt(array("I", spec.prompt_ids), "")], 0
        sources: list[Source] = []
        for prompt in completion_prompts(request):
            if isinstance(prompt, str):
                sources.append(prompt)
            else:
                text = served.text.tokenizer.decode(prompt, skip_special=False) if spec.echo else ""
                sources.append(Prompt(array("I", prompt), text))
        return spec, sources, 0

    def _encode(self, served: ServedModel, source: Source, special: bool, salt: str | None) -> Prompt:
        """Return a prompt with its ids. Whose prefix caches a ``salt`` keeps apart shares no other memory either."""
        if isinstance(source, Prompt):
            return source
        ids = served.text.tokenizer.encode(
            source, add_special_tokens=special, max_tokens=served.card.context_length, remember=salt is None
        )
        return Prompt(ids, source)

    async def _encode_large(self, served: ServedModel, source: Source, special: bool, salt: str | None) -> Prompt:
        if isinstance(source, Prompt):
            return source
        if len(source) < HUGE_TEXT_CHARS:
            return await self._offload.run(self._encode, served, source, special, salt)
        artifact = served.card.tokenizer
        packed = await self._pool.encode(
            artifact.sha256,
            lambda: self._registry.file(artifact),
            source,
            add_special_tokens=special,
            max_tokens=served.card.context_length,
        )
        ids = array("I")
        ids.frombytes(packed)
        return Prompt(ids, source)
