"""The reference's word for how a request ended, from the error that it ended with.

Must never know HTTP or requests.
"""

from __future__ import annotations

from typing import Literal

from holdfast.base import errors

ErrorType = Literal[
    "", "validation", "not_found", "overload", "unavailable", "cancelled", "response_timeout", "first_token_timeout",
    "intra_token_timeout", "internal", "not_implemented", "backend_error", "truncated_stream", "client_stalled",
]  # fmt: skip
"""Values of the label ``error_type``; empty: success."""

_BY_CLASS: tuple[tuple[type[errors.HoldfastError], ErrorType], ...] = (
    (errors.ClientStalled, "client_stalled"),
    (errors.Cancelled, "cancelled"),
    (errors.NotFound, "not_found"),
    (errors.UnsupportedFeature, "not_implemented"),
    (errors.InvalidRequest, "validation"),
    (errors.CapacityExhausted, "overload"),
    (errors.NoWorkers, "unavailable"),
    (errors.StreamIncomplete, "truncated_stream"),
    (errors.WorkerFault, "backend_error"),
    (errors.TransportFault, "backend_error"),
    (errors.PoisonRequest, "backend_error"),
    (errors.MigrationExhausted, "backend_error"),
    (errors.ShuttingDown, "unavailable"),
)
_BY_STAGE: dict[object, ErrorType] = {
    "total": "response_timeout",
    "first token": "first_token_timeout",
    "next token": "intra_token_timeout",
}


def error_type(error: errors.HoldfastError | None) -> ErrorType:
    """Return the label's value; None is success."""
    if error is None:
        return ""
    if isinstance(error, errors.DeadlineExceeded | errors.WorkerStalled):
        stage = _BY_STAGE.get(error.details.get("stage"))
        if stage is not None:
            return stage
        return "backend_error" if isinstance(error, errors.WorkerStalled) else "response_timeout"
    return next((word for cls, word in _BY_CLASS if isinstance(error, cls)), "internal")
