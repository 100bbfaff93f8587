"""From a request to ``SamplingParams``, and what has to be refused.

Facts of the default (torch) sampler behind the choices: with neither temperature, top_p nor top_k given it is greedy,
so a temperature is always passed unless greedy is meant; ``top_k=1`` is greedy on every version; a stop token id is cut
from the output unless ``include_stop_str_in_output``; the end id alone is never cut. Must never import the package.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.attempt import Attempt
from holdfast.engines.contract import Capabilities, EngineInfo, Guided, Sampling
from holdfast.engines.llamacpp.checks import check_sampling
from holdfast.engines.trtllm.api import Api

_MASK = (1 << 64) - 1


def refuse(attempt: Attempt, info: EngineInfo) -> None:
    """Raise InvalidRequest for values without a meaning, UnsupportedFeature for what this engine cannot do."""
    sampling, can = attempt.request.sampling, info.capabilities
    check_sampling(sampling, attempt.request.stop, info.vocab_size)
    if _penalised(sampling) and not can.penalties:
        raise UnsupportedFeature(
            f"TensorRT-LLM {info.version} ignores penalties; version 1.3 or newer applies them.",
            param="repetition_penalty",
        )
    if sampling.guided is not None:
        _refuse_guided(sampling.guided, can)


def _refuse_guided(guided: Guided, can: Capabilities) -> None:
    if guided.kind not in can.guided:
        offered = ", ".join(can.guided) or "none (DYN_TRTLLM_GUIDED_DECODING_BACKEND is not set)"
        raise UnsupportedFeature(
            f"This worker does not constrain output by {guided.kind}; it offers: {offered}.", param="response_format"
        )
    if guided.kind == "choice":
        _choices(guided.value)


def _penalised(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def sampling_params(api: Api, attempt: Attempt, info: EngineInfo) -> Any:
    """Return the ``SamplingParams`` of an attempt."""
    prefill = attempt.request.leg == "prefill"
    return api.SamplingParams(
        **_ends(attempt, info, never=prefill),
        **_choice(attempt),
        **_extras(api, attempt.request.sampling, info),
        max_tokens=attempt.max_tokens,
        detokenize=False,
        add_special_tokens=False,
    )


def _ends(attempt: Attempt, info: EngineInfo, *, never: bool) -> dict[str, Any]:
    """Return what ends the sequence.

    ``never``: a prefill leg, whose one token must not end it, because a leg that has ended hands nothing over.
    """
    stop, eos = attempt.request.stop, info.eos_token_ids
    ends: dict[str, Any] = {"end_id": eos[0] if eos else -1, "ignore_eos": stop.ignore_eos or never}
    if never:
        return ends
    more = () if stop.ignore_eos else eos[1:]
    ids = list(dict.fromkeys((*stop.stop_token_ids, *more)))
    if ids:
        ends["stop_token_ids"] = ids
        ends["include_stop_str_in_output"] = True
    if attempt.min_tokens > 0:
        ends["min_tokens"] = attempt.min_tokens
    return ends


def _choice(attempt: Attempt) -> dict[str, Any]:
    """Return how the next token is drawn."""
    sampling = attempt.request.sampling
    drawn: dict[str, Any] = {"top_k": 1}
    if sampling.temperature > 0:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": max(0, sampling.top_k)}
        drawn["seed"] = _seed(sampling.seed, attempt.first_index)
        if sampling.min_p > 0:
            drawn["min_p"] = sampling.min_p
    if sampling.repetition_penalty != 1:
        drawn["repetition_penalty"] = sampling.repetition_penalty
    if sampling.presence_penalty:
        drawn["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        drawn["frequency_penalty"] = sampling.frequency_penalty
    return drawn


def _seed(seed: int, index: int) -> int:
    """Return the seed of an attempt from its first output index: another each time, lest the same be drawn again."""
    return seed & _MASK if index == 0 else xxh3_64_intdigest(struct.pack("<QQ", seed & _MASK, index))


def _extras(api: Api, sampling: Sampling, info: EngineInfo) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if sampling.logprobs is not None:
        extras["logprobs"] = max(1, sampling.logprobs)  # 0 means none at all on older versions
    if sampling.logit_bias:
        extras["embedding_bias"] = api.bias(info.vocab_size, sampling.logit_bias)
    if sampling.guided is not None:
        extras["guided_decoding"] = api.GuidedDecodingParams(**_guide(sampling.guided))
    return extras


def _guide(guided: Guided) -> dict[str, Any]:
    if guided.kind == "json_object":
        return {"json_object": True}
    if guided.kind == "json_schema":
        return {"json": guided.value}
    if guided.kind == "choice":
        return {"regex": "(" + "|".join(re.escape(choice) for choice in _choices(guided.value)) + ")"}
    return {guided.kind: guided.value}


def _choices(value: str) -> list[str]:
    try:
        found = msgspec.json.decode(value, type=list[str])
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The choices are not a list of texts: {error}.", param="guided_choice") from error
    if not found:
        raise InvalidRequest("The list of choices is empty.", param="guided_choice")
    return found
