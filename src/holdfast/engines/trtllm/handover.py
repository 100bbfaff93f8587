"""KV hand-offs of TensorRT-LLM: ``DisaggregatedParams`` to something that can travel, and back.

The generation engine plays the first token of the prefill leg itself and reports it like any other, so nothing is put
before its output here. Must never import the package.
"""

from __future__ import annotations

import base64
from typing import Any

from holdfast.base.errors import InvalidRequest
from holdfast.engines.trtllm.api import Api

PROTOCOL = "trtllm"
_PLAIN = ("first_gen_tokens", "ctx_request_id", "draft_tokens", "disagg_request_id", "ctx_dp_rank", "ctx_info_endpoint")


def pack(params: Any) -> dict[str, Any]:
    """Return the fields of ``DisaggregatedParams`` that the decode leg needs, as plain values."""
    packed = {name: getattr(params, name, None) for name in _PLAIN}
    state = getattr(params, "opaque_state", None)
    if state is not None:
        packed["opaque_state"] = base64.b64encode(bytes(state)).decode("ascii")
    logprobs = getattr(params, "first_gen_log_probs", None)
    if logprobs:
        packed["first_gen_log_probs"] = _plain_logprobs(logprobs)
    return {name: value for name, value in packed.items() if value is not None}


def unpack(api: Api, params: dict[str, Any]) -> Any:
    """Return the ``DisaggregatedParams`` of a decode leg. Raises InvalidRequest when they are no such thing."""
    try:
        fields = {name: params[name] for name in _PLAIN if name in params}
        if "opaque_state" in params:
            fields["opaque_state"] = base64.b64decode(params["opaque_state"], validate=True)
        if "first_gen_log_probs" in params:
            fields["first_gen_log_probs"] = _engine_logprobs(api, params["first_gen_log_probs"])
        if not fields.get("first_gen_tokens"):
            raise InvalidRequest("The KV hand-off lacks the first token, without which decoding cannot begin.")
        return api.DisaggregatedParams(request_type="generation_only", **fields)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"The KV hand-off cannot be read: {error}.") from error


def _plain_logprobs(value: Any) -> Any:
    """Return log probabilities with each mapping of token id to ``Logprob`` as a list of triples."""
    if isinstance(value, dict):
        return {"tokens": [[token, entry.logprob, entry.rank] for token, entry in value.items()]}
    return [_plain_logprobs(item) for item in value] if isinstance(value, list | tuple) else value


def _engine_logprobs(api: Api, value: Any) -> Any:
    if isinstance(value, dict):
        return {token: api.Logprob(logprob=logprob, rank=rank) for token, logprob, rank in value["tokens"]}
    return [_engine_logprobs(api, item) for item in value] if isinstance(value, list) else value
