"""From a checked request to what the rest of Holdfast works with: `GenerationSpec`.

Where the client is silent, the model's own generation config speaks (temperature, top_p, top_k, min_p,
repetition_penalty; ``do_sample: false`` means temperature 0), and where that is silent too, OpenAI's defaults
hold (temperature 1, top_p 1, no penalties). What the model's engine can't do is refused here, before
any work; a default of the generation config that the engine can't do is left out instead.
Must never tokenize, choose a worker or draw a seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec

from holdfast.base.errors import ContextLengthExceeded, InvalidRequest, UnsupportedFeature
from holdfast.engines.contract import Sampling, StopRules
from holdfast.models.card import ModelCard
from holdfast.openai.guided import guided_of
from holdfast.openai.tools import NO_TOOLS, ToolUse, tool_use
from holdfast.openai.types import ChatCompletionRequest, CommonRequest, CompletionRequest, NvExt, WorkerId

Defaults = Mapping[str, Any]
"""A model's generation config (`PromptFiles.generation_config`)."""


class Steering(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the client wishes about scheduling and placement. All advisory, all can be switched off."""

    priority: int = 0
    """Higher goes first."""
    strict_priority: int = 0
    """Sorts before ``priority``."""
    worker: str | None = None
    """Instance id that should serve it."""
    prefill_worker: str | None = None
    dp_rank: int | None = None
    expected_output_tokens: int | None = None
    session_id: str | None = None
    policy_class: str | None = None
    """Family or class among those that wait."""
    router: dict[str, Any] = {}
    """Overrides of the router's parameters for this request."""


class GenerationSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one request but its prompt."""

    sampling: Sampling
    """Seed 0; `sampling_for` puts the choice's own in."""
    seed: int | None
    """The client's seed, as 64 unsigned bits."""
    n: int = 1
    max_tokens: int | None = None
    """None: as many as fit (`token_budget`)."""
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """Whether a matched stop string stays in the text."""
    skip_special_tokens: bool = True
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    """Text completions: the answer's text (each choice's first event in a stream) starts with the prompt's text."""
    tokens_as_ids: bool = False
    """Log probabilities name tokens as ``token_id:<id>``."""
    tools: ToolUse = NO_TOOLS
    template_kwargs: dict[str, Any] = {}
    raw_prompt: bool = False
    """Chat: skip the template, the prompt is the messages' text (`prompt.raw_prompt`)."""
    prompt_ids: tuple[int, ...] = ()
    """The client's own tokens (``nvext.token_data``); when not empty they are the prompt."""
    cache_salt: str | None = None
    annotations: tuple[str, ...] = ()
    extra_fields: tuple[str, ...] = ()
    steering: Steering = Steering()

    def sampling_for(self, seed: int) -> Sampling:
        """Return the sampling parameters of one choice; ``seed`` is already mixed per choice."""
        return msgspec.structs.replace(self.sampling, seed=seed)

    def stop_rules(self, max_tokens: int) -> StopRules:
        """Return the stop rules with the budget that `token_budget` found."""
        return StopRules(max_tokens, min(self.min_tokens, max_tokens), self.stop_token_ids, self.ignore_eos)


def token_budget(spec: GenerationSpec, prompt_tokens: int, context_length: int, *, param: str = "messages") -> int:
    """Return how many tokens may be generated after a prompt of this length; ``param`` names the prompt's field.

    Raises:
        ContextLengthExceeded: the prompt leaves no room, or the client asks for more than there is.
    """
    room = context_length - prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"The prompt has {prompt_tokens} tokens and the model's context length is {context_length}.",
            param=param,
            limit=context_length,
            actual=prompt_tokens,
        )
    if spec.max_tokens is None:
        return room
    if spec.max_tokens > room:
        raise ContextLengthExceeded(
            f"The prompt has {prompt_tokens} tokens and max_tokens is {spec.max_tokens}; together they exceed the "
            f"model's context length of {context_length} by {spec.max_tokens - room}.",
            param="max_tokens",
            limit=context_length,
            actual=prompt_tokens + spec.max_tokens,
        )
    return spec.max_tokens


def chat_spec(
    request: ChatCompletionRequest, card: ModelCard, defaults: Defaults, *, steering: bool = True
) -> GenerationSpec:
    """Map a chat request.

    Args:
        request: from `parse.parse_chat`.
        card: of the model that it names.
        defaults: the model's generation config.
        steering: False ignores the client's priority and placement wishes.

    Raises:
        UnsupportedFeature: the model's engine can't do an option; ``param`` names it.
        InvalidRequest: a value that contradicts the model (token id outside the vocabulary …).
    """
    tools = tool_use(request) if request.tools else NO_TOOLS
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    kwargs = request.chat_template_kwargs or request.chat_template_args or {}
    if request.reasoning_effort is not None:
        kwargs = {"reasoning_effort": request.reasoning_effort, **kwargs}
    return _spec(
        request,
        card,
        defaults,
        logprobs=("top_logprobs" if request.top_logprobs else "logprobs", logprobs),
        tools=tools,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        template_kwargs=kwargs,
        steering=steering,
    )


def completion_spec(
    request: CompletionRequest, card: ModelCard, defaults: Defaults, *, steering: bool = True
) -> GenerationSpec:
    """Map a text completion request; as `chat_spec`."""
    _check_ids("prompt", _largest_id(request.prompt), card)
    return _spec(
        request,
        card,
        defaults,
        logprobs=("logprobs", request.logprobs),
        echo=bool(request.echo),
        max_tokens=request.max_tokens,
        steering=steering,
    )


def _spec(
    request: CommonRequest,
    card: ModelCard,
    defaults: Defaults,
    *,
    logprobs: tuple[str, int | None],
    max_tokens: int | None,
    steering: bool,
    tools: ToolUse = NO_TOOLS,
    echo: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> GenerationSpec:
    ext = request.nvext
    stop = request.stop
    _check_logprobs(*logprobs, card)
    _check_vocabulary(request, card)
    options = request.stream_options
    return GenerationSpec(
        sampling=_sampling(request, card, defaults, logprobs[1], tools),
        seed=None if request.seed is None else request.seed & 0xFFFF_FFFF_FFFF_FFFF,
        n=request.n or 1,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        echo=echo,
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        tools=tools,
        template_kwargs=template_kwargs or {},
        raw_prompt=bool(ext and ext.use_raw_prompt),
        prompt_ids=tuple(ext.token_data or ()) if ext else (),
        cache_salt=request.cache_salt or (ext.cache_salt if ext else None),
        annotations=tuple(ext.annotations or ()) if ext else (),
        extra_fields=tuple(ext.extra_fields or ()) if ext else (),
        steering=_steering(request.priority, ext) if steering else _NO_STEERING,
    )


def _check_logprobs(param: str, wanted: int | None, card: ModelCard) -> None:
    if wanted is None:
        return
    if card.max_logprobs < 0:
        raise UnsupportedFeature(f"'{param}': this model's engine reports no log probabilities.", param=param)
    if wanted > card.max_logprobs:
        raise UnsupportedFeature(
            f"'{param}' is {wanted}; this model's engine reports at most {card.max_logprobs} alternatives.", param=param
        )


def _check_vocabulary(request: CommonRequest, card: ModelCard) -> None:
    if request.logit_bias:
        _check_ids("logit_bias", max(request.logit_bias), card)
    if request.stop_token_ids:
        _check_ids("stop_token_ids", max(request.stop_token_ids), card)
    if request.nvext is not None and request.nvext.token_data:
        _check_ids("nvext.token_data", max(request.nvext.token_data), card)


def _check_ids(param: str, largest: int, card: ModelCard) -> None:
    if largest >= card.vocab_size:
        raise InvalidRequest(
            f"'{param}' holds the token id {largest}; the model's vocabulary ends at {card.vocab_size - 1}.",
            param=param,
        )


def _largest_id(prompt: str | list[str | int | list[int]]) -> int:
    if isinstance(prompt, str):
        return -1
    if prompt and isinstance(prompt[0], int):
        with contextlib.suppress(TypeError):  # mixed: looked at one by one
            largest: int = max(prompt)  # type: ignore[assignment]
            return largest
    return max(
        (max(entry) if isinstance(entry, list) else entry for entry in prompt if not isinstance(entry, str)), default=-1
    )


def _sampling(
    request: CommonRequest, card: ModelCard, defaults: Defaults, logprobs: int | None, tools: ToolUse
) -> Sampling:
    bias = request.logit_bias
    if bias and not card.logit_bias:
        raise UnsupportedFeature("'logit_bias': this model's engine can't bias tokens.", param="logit_bias")
    temperature, top_p, top_k = _randomness(request, defaults)
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=_first(request.min_p, _number(defaults, "min_p", 0, 1), 0.0),
        repetition_penalty=_repetition_penalty(request, card, defaults),
        presence_penalty=_penalty("presence_penalty", request.presence_penalty, card),
        frequency_penalty=_penalty("frequency_penalty", request.frequency_penalty, card),
        logit_bias=bias or {},
        logprobs=logprobs,
        guided=guided_of(request, tools, card.guided),
    )


def _randomness(request: CommonRequest, defaults: Defaults) -> tuple[float, float, int]:
    """Return temperature, top_p and top_k; a top_p of 0 means the most likely token, which is top_k 1."""
    greedy = defaults.get("do_sample") is False
    temperature = _first(request.temperature, 0.0 if greedy else _number(defaults, "temperature", 0, 2), 1.0)
    if request.nvext is not None and request.nvext.greed_sampling:
        temperature = 0.0
    top_p = _first(request.top_p, _number(defaults, "top_p", 0, 1), 1.0)
    top_k = request.top_k if request.top_k is not None else int(_number(defaults, "top_k", -1, 2**31) or 0)
    if top_p <= 0.0:
        return temperature, 1.0, 1
    return temperature, top_p, max(top_k, 0)


def _repetition_penalty(request: CommonRequest, card: ModelCard, defaults: Defaults) -> float:
    if request.repetition_penalty is not None:
        return _penalty("repetition_penalty", request.repetition_penalty, card, neutral=1.0)
    default = _number(defaults, "repetition_penalty", 0, 10)
    return default if default and card.penalties else 1.0


def _penalty(param: str, value: float | None, card: ModelCard, neutral: float = 0.0) -> float:
    if value is None or value == neutral:
        return neutral
    if not card.penalties:
        raise UnsupportedFeature(f"'{param}': this model's engine can't apply penalties.", param=param)
    return value


_NUMBERS = (float, int)


def _first(value: float | None, default: float | None, otherwise: float) -> float:
    if value is not None:
        return value
    return otherwise if default is None else default


def _number(defaults: Defaults, key: str, least: float, most: float) -> float | None:
    """Return a usable number of the generation config; models ship nulls and odd values, which don't count."""
    value = defaults.get(key)
    if value is None or type(value) not in _NUMBERS:
        return None
    return float(value) if least <= value <= most else None


_NO_STEERING = Steering()


def _steering(priority: int | None, ext: NvExt | None) -> Steering:
    if ext is None:
        return Steering(priority) if priority else _NO_STEERING
    hints = ext.agent_hints
    hinted = hints.priority if hints else None
    return Steering(
        priority=priority if priority is not None else hinted or 0,
        strict_priority=(hints.strict_priority or 0) if hints else 0,
        worker=_worker(ext.backend_instance_id if ext.backend_instance_id is not None else ext.decode_worker_id),
        prefill_worker=_worker(ext.prefill_worker_id),
        expected_output_tokens=hints.osl if hints else None,
        session_id=ext.session_control.session_id if ext.session_control else None,
        router=ext.router or {},
    )


def _worker(worker: WorkerId | None) -> str | None:
    """Return an instance id as Holdfast writes it: numbers become 16 hexadecimal digits."""
    return f"{worker:016x}" if isinstance(worker, int) else worker
