"""Where and under which number the two legs of a request meet.

A `KvHandoff` of the style ``rendezvous`` says it; so does the canary's payload, with a host that means: nobody (SGLang
then goes the whole way by itself).

Must never import SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.engines.contract import GenerateRequest

CANARY = "bootstrap_info"
"""Key of `GenerateRequest.extra` (`health.payloads.SglangDisaggHealthCheckPayload`)."""


class Meeting(msgspec.Struct, frozen=True):
    """SGLang's own arguments."""

    bootstrap_host: str
    bootstrap_port: int
    bootstrap_room: int
    disagg_prefill_dp_rank: int | None = None


class _Params(msgspec.Struct, frozen=True):
    bootstrap_host: str
    bootstrap_port: int
    bootstrap_room: int
    prefill_rank: int | None = None


def meeting_of(request: GenerateRequest) -> Meeting | None:
    """Return where a request's legs meet; None: it has none.

    Raises:
        InvalidRequest: the hand-off does not say it.
    """
    found: Mapping[str, Any] | None = None
    if request.handoff is not None:
        found = request.handoff.params
    elif isinstance(told := request.extra.get(CANARY), Mapping):
        found = told
    if found is None:
        return None
    try:
        params = msgspec.convert(found, _Params)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The hand-off does not say where its legs meet: {error}.") from error
    return Meeting(params.bootstrap_host, params.bootstrap_port, params.bootstrap_room, params.prefill_rank)
