"""What a request asks for, in SGLang's words.

SGLang's scheduler dies of some values that it does not check (token ids outside the vocabulary), and without its
tokenizer it refuses others (least number of tokens, guided decoding); here they are refused or translated before.

Must never import SGLang.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.base.limits import TOP_LOGPROBS
from holdfast.engines.attempt import Attempt
from holdfast.engines.contract import Guided, GuidedKind, Sampling

LONGEST_TOPS = TOP_LOGPROBS
FORBIDDEN = -1e9
"""A bias after which a token is never drawn; minus infinity could leave no token at all."""
GUIDED: tuple[GuidedKind, ...] = ("json_object", "json_schema", "grammar", "regex", "choice")
_SEED_BITS = (1 << 63) - 1
_REGEX_SPECIAL = frozenset(r"\.^$*+?{}[]|()/-")
_PENALTIES = 2.0
"""SGLang takes frequency and presence penalties of at most this size, and repetition penalties up to it."""


class Skills(msgspec.Struct, frozen=True):
    """What this instance of SGLang can do, as it was started."""

    vocab_size: int
    tokenizer: bool
    """It has loaded the model's tokenizer (`SglangConfig.guided`)."""
    seeds: bool
    """Sampling is keyed by (seed, position): ``--enable-deterministic-inference``."""


def check(attempt: Attempt, can: Skills) -> None:
    """Refuse what this SGLang cannot do. Raises InvalidRequest or UnsupportedFeature."""
    sampling = attempt.request.sampling
    for name, ids in (
        ("stop_token_ids", attempt.request.stop.stop_token_ids),
        ("logit_bias", tuple(sampling.logit_bias)),
    ):
        wrong = [token for token in ids if not 0 <= token < can.vocab_size]
        if wrong:
            raise InvalidRequest(f"{name} names token {wrong[0]}; the vocabulary has {can.vocab_size}.", param=name)
    _check_ranges(sampling)
    if sampling.logprobs is not None and sampling.logprobs > LONGEST_TOPS:
        raise InvalidRequest(
            f"{sampling.logprobs} alternatives were asked for; at most {LONGEST_TOPS} are told.", param="top_logprobs"
        )
    if sampling.guided is not None and not can.tokenizer:
        raise UnsupportedFeature(
            "This SGLang worker runs without a tokenizer and cannot constrain its output; it can when it is started "
            "with --sglang-guided.",
            param="response_format",
        )
    if attempt.min_tokens and not can.tokenizer and _keeps_counts(sampling):
        raise UnsupportedFeature(
            "This SGLang worker runs without a tokenizer and cannot join min_tokens with penalties; it can when it is "
            "started with --sglang-guided.",
            param="min_tokens",
        )


def begins_anew(attempt: Attempt) -> bool:
    """Whether what exists is to be generated once more: a grammar is only right from its beginning."""
    return attempt.request.sampling.guided is not None and attempt.first_index > 0


def params_of(attempt: Attempt, can: Skills) -> dict[str, Any]:
    """Return SGLang's ``sampling_params``, from ``attempt.ids`` on, or from the prompt on (`begins_anew`).

    The least number of tokens is left out unless SGLang has a tokenizer; see `forced`.
    """
    anew = begins_anew(attempt)
    most = attempt.limit if anew and attempt.request.leg != "prefill" else attempt.max_tokens
    least = min(attempt.request.stop.min_tokens, attempt.limit) if anew else attempt.min_tokens
    request, sampling = attempt.request, attempt.request.sampling
    params: dict[str, Any] = {
        "max_new_tokens": most,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "ignore_eos": request.stop.ignore_eos,
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    if attempt.ends and not request.stop.ignore_eos:
        params["stop_token_ids"] = sorted(attempt.ends)
    if bias := _bias(attempt):
        params["logit_bias"] = {str(token): value for token, value in bias.items()}
    if can.seeds:
        params["sampling_seed"] = sampling.seed & _SEED_BITS
    if least and can.tokenizer:
        params["min_new_tokens"] = min(least, most)
    if sampling.guided is not None:
        params |= _constraint(sampling.guided)
    return params


def forced(params: dict[str, Any], attempt: Attempt) -> dict[str, Any]:
    """Return the parameters for the first ``attempt.min_tokens`` tokens, of which none may end the sequence.

    Without a tokenizer SGLang has no such minimum; a run in which the end tokens cannot be drawn, followed by one in
    which they can, is the same.
    """
    bias = {**params.get("logit_bias", {}), **{str(token): FORBIDDEN for token in attempt.ends}}
    rest = {key: value for key, value in params.items() if key != "stop_token_ids"}
    return {**rest, "max_new_tokens": attempt.min_tokens, "ignore_eos": True, "logit_bias": bias}


def _bias(attempt: Attempt) -> dict[int, float]:
    """Return what is added to logits: what the request says, and what penalties earlier attempts have earned.

    SGLang counts from where it begins. What frequency penalties subtract can be carried over as it is; of presence
    penalties too, but a token that comes again pays once more.
    """
    sampling = attempt.request.sampling
    bias = dict(sampling.logit_bias)
    if (sampling.frequency_penalty or sampling.presence_penalty) and not begins_anew(attempt):
        for token, count in Counter(attempt.ids[attempt.prompt_tokens :]).items():
            bias[token] = bias.get(token, 0.0) - sampling.frequency_penalty * count - sampling.presence_penalty
    return bias


def _check_ranges(sampling: Sampling) -> None:
    for name, value in (
        ("frequency_penalty", sampling.frequency_penalty),
        ("presence_penalty", sampling.presence_penalty),
    ):
        if not -_PENALTIES <= value <= _PENALTIES:
            raise InvalidRequest(f"{name} is {value:g}; SGLang takes -2 to 2.", param=name)
    if not 0.0 < sampling.repetition_penalty <= _PENALTIES:
        raise InvalidRequest(
            f"repetition_penalty is {sampling.repetition_penalty:g}; SGLang takes more than 0, up to 2.",
            param="repetition_penalty",
        )
    if not 0.0 <= sampling.temperature < float("inf"):
        raise InvalidRequest(f"temperature is {sampling.temperature}; it is 0 or more.", param="temperature")
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequest(f"top_p is {sampling.top_p:g}; it lies above 0 and up to 1.", param="top_p")
    if not 0.0 <= sampling.min_p <= 1.0:
        raise InvalidRequest(f"min_p is {sampling.min_p:g}; it lies in 0 to 1.", param="min_p")


def _keeps_counts(sampling: Sampling) -> bool:
    return bool(sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1.0)


def _constraint(guided: Guided) -> dict[str, str]:
    if guided.kind == "json_object":
        return {"json_schema": '{"type":"object"}'}
    if guided.kind == "json_schema":
        return {"json_schema": guided.value}
    if guided.kind == "regex":
        return {"regex": guided.value}
    if guided.kind == "choice":
        return {"regex": "(" + "|".join(map(_literal, _choices(guided.value))) + ")"}
    return {"ebnf": guided.value}


def _choices(value: str) -> list[str]:
    try:
        return msgspec.json.decode(value, type=list[str])
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The choices are no JSON list of texts: {error}.", param="guided_choice") from error


def _literal(text: str) -> str:
    return "".join(f"\\{letter}" if letter in _REGEX_SPECIAL else letter for letter in text)
