"""The one error tree of Holdfast.

Two attributes decide everything: ``fault`` says whose it is, ``retry`` says what may be done::

    HoldfastError
    ├── InvalidRequest          caller     never      400
    │   ├── ContextLengthExceeded                     400
    │   ├── Unauthenticated                           401
    │   ├── NotFound                                  404
    │   ├── Conflict                                  409
    │   ├── PayloadTooLarge                           413
    │   └── UnsupportedFeature                        400
    ├── Cancelled               caller     never      499
    │   └── ClientStalled         took no byte for too long
    ├── PoisonRequest           request    never      500
    ├── DeadlineExceeded        internal   later      504
    ├── CapacityExhausted       capacity   later      503
    │   └── WorkerSaturated     capacity   elsewhere  503
    ├── NoWorkers               capacity   later      503
    ├── WorkerFault             worker     elsewhere  503
    │   ├── WorkerDraining      worker     elsewhere  503   (never counted against the worker)
    │   ├── EngineFailed        worker     elsewhere  500
    │   ├── StreamIncomplete    worker     elsewhere  502
    │   └── WorkerStalled       worker     elsewhere  504
    ├── TransportFault          transport  elsewhere  503
    │   ├── CannotConnect       transport  elsewhere  503
    │   │   ├── VersionMismatch   no common protocol version
    │   │   ├── WrongInstance     another worker, or a later start of it, answers at this address
    │   │   └── SecretMismatch    the two sides do not share a secret
    │   ├── Disconnected        transport  elsewhere  502
    │   ├── PeerSilent          transport  elsewhere  504
    │   ├── AcceptOverdue       transport  elsewhere  504   (never counted against the worker)
    │   └── ProtocolViolation   transport  elsewhere  502
    ├── HandoffFault            internal   same       503   (never the client's last word: the prompt is computed anew)
    │   ├── HandoffMismatch       stands for other tokens, or for another engine
    │   └── HandoffLost           the blocks, or their owner, are gone
    ├── MigrationExhausted      internal   later      503
    ├── ShuttingDown            internal   later      503
    └── InternalError           internal   never      500

Every class has a stable ``code``, an HTTP ``status``, an OpenAI ``type`` and a sentence (``hint``)
that tells the reader what to do next. Only ``worker`` and ``transport`` faults count against a
worker (promise P10). Errors cross the wire as `ErrorInfo`; `base.restored` makes them errors again.

Must never import anything of Holdfast, and never carry prompt or generated text.
"""

from typing import Any, ClassVar, Literal

import msgspec

Fault = Literal["caller", "request", "worker", "capacity", "transport", "internal"]
Retry = Literal["never", "same", "elsewhere", "later"]


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it crosses the wire."""

    code: str
    message: str
    fault: str = "internal"
    retry: str = "never"
    details: dict[str, Any] = {}


class HoldfastError(Exception):
    """Root of all errors. ``details`` are facts for operators (limit, actual, knob, worker …)."""

    code: ClassVar[str] = "internal"
    fault: Fault = "internal"
    retry: Retry = "never"
    status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "internal_error"
    hint: ClassVar[str] = "This is a fault in Holdfast; please report it with the request id."

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None, **details: Any):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.details = details

    def info(self) -> ErrorInfo:
        """Return the wire form."""
        details = dict(self.details)
        if self.param is not None:
            details["param"] = self.param
        if self.retry_after is not None:
            details["retry_after"] = self.retry_after
        return ErrorInfo(self.code, self.message, self.fault, self.retry, details)

    def openai_body(self) -> dict[str, Any]:
        """Return the body that OpenAI clients understand: ``{"error": {...}}``."""
        error: dict[str, Any] = {
            "message": f"{self.message} {self.hint}".strip(),
            "type": self.openai_type,
            "param": self.param,
            "code": self.code,
        }
        if self.details:
            error["details"] = {k: v for k, v in self.details.items() if v is not None}
        return {"error": error}


class InvalidRequest(HoldfastError):
    """The caller must change the request."""

    code = "invalid_request"
    fault = "caller"
    status = 400
    openai_type = "invalid_request_error"
    hint = ""


class ContextLengthExceeded(InvalidRequest):
    """Prompt (or prompt plus requested tokens) does not fit the model's context."""

    code = "context_length_exceeded"
    hint = "Shorten the messages or lower max_tokens."


class Unauthenticated(InvalidRequest):
    """No key, or a key that is not known."""

    code = "invalid_api_key"
    status = 401
    openai_type = "authentication_error"
    hint = "Send a known key as 'Authorization: Bearer <key>'."


class NotFound(InvalidRequest):
    """The named thing (model, route, request) does not exist here."""

    code = "not_found"
    status = 404
    openai_type = "not_found_error"


class ModelNotFound(NotFound):
    """No card of that model name is known."""

    code = "model_not_found"
    hint = "GET /v1/models lists what is served."


class Conflict(InvalidRequest):
    """Contradicts the present state."""

    code = "conflict"
    status = 409


class PayloadTooLarge(InvalidRequest):
    """A size limit of `base.limits` was hit."""

    code = "payload_too_large"
    status = 413


class UnsupportedFeature(InvalidRequest):
    """Valid in the API, yet this engine or model cannot do it."""

    code = "unsupported_feature"
    hint = "Leave the option out, or use a model whose engine supports it."


class Cancelled(HoldfastError):
    """The client went away, or asked to stop."""

    code = "cancelled"
    fault = "caller"
    status = 499
    openai_type = "cancelled"
    hint = ""


class ClientStalled(Cancelled):
    """The client took no byte for longer than its bound."""

    code = "client_stalled"


class PoisonRequest(HoldfastError):
    """This request was being worked on by several workers when each of them died."""

    code = "poison_request"
    fault = "request"
    status = 500
    openai_type = "poison_request"
    hint = "It will not be tried again; look at the workers' logs for what this prompt triggers."


class DeadlineExceeded(HoldfastError):
    """A stage took longer than its deadline; ``details`` name the stage, the bound and its knob."""

    code = "deadline_exceeded"
    fault = "internal"
    retry = "later"
    status = 504
    openai_type = "deadline_exceeded"
    hint = "Retry later, or raise the deadline that is named."


class CapacityExhausted(HoldfastError):
    """Over a limit of this fleet; ``details`` name layer, knob, threshold and measured value."""

    code = "capacity_exhausted"
    fault = "capacity"
    retry: Retry = "later"
    status = 503
    openai_type = "service_unavailable"
    hint = "Retry after the time in Retry-After."


class WorkerSaturated(CapacityExhausted):
    """One worker is at its own limit; another may have room."""

    code = "worker_saturated"
    retry = "elsewhere"


class NoWorkers(HoldfastError):
    """No worker that could serve this is usable, and waiting for one was bounded."""

    code = "no_workers"
    fault = "capacity"
    retry = "later"
    status = 503
    openai_type = "service_unavailable"
    hint = "Start a worker for this model, or look at 'holdfast status'."


class WorkerFault(HoldfastError):
    """A worker failed this attempt; another one may do it."""

    code = "worker_fault"
    fault = "worker"
    retry = "elsewhere"
    status = 503
    openai_type = "service_unavailable"
    hint = "Retry; if it persists look at the worker's log."


class WorkerDraining(WorkerFault):
    """The worker is leaving in order; never counted against it."""

    code = "worker_draining"


class EngineFailed(WorkerFault):
    """The engine reported an error for this sequence, or died."""

    code = "engine_failed"
    status = 500


class StreamIncomplete(WorkerFault):
    """A stream stopped, or skipped tokens, without a proper end."""

    code = "stream_incomplete"
    status = 502


class WorkerStalled(WorkerFault):
    """Busy without progress: the engine hangs in a live process."""

    code = "worker_stalled"
    status = 504


class TransportFault(HoldfastError):
    """The connection to a worker failed."""

    code = "transport_fault"
    fault = "transport"
    retry = "elsewhere"
    status = 503
    openai_type = "service_unavailable"
    hint = "Retry; if it persists check the network between frontend and worker."


class CannotConnect(TransportFault):
    """No connection could be made."""

    code = "cannot_connect"


class VersionMismatch(CannotConnect):
    """The two sides have no protocol version in common; ``details`` name both ranges."""

    code = "version_mismatch"
    hint = "Upgrade the older side: neighbouring versions understand each other."


class WrongInstance(CannotConnect):
    """Another worker, or a later start of the expected one, answers at this address."""

    code = "wrong_instance"
    hint = "The address was reused; discovery will name the new instance."


class SecretMismatch(CannotConnect):
    """One side has no secret, or they have different ones."""

    code = "secret_mismatch"
    hint = "Give frontends and workers the same shared secret."


class Disconnected(TransportFault):
    """An established connection was lost."""

    code = "disconnected"
    status = 502


class PeerSilent(TransportFault):
    """The peer answers no pings: frozen process, paused machine or partition."""

    code = "peer_silent"
    status = 504


class AcceptOverdue(TransportFault):
    """No `accept` within its deadline; the worker may just be slow, so it is not counted against it."""

    code = "accept_overdue"
    status = 504


class ProtocolViolation(TransportFault):
    """The peer sent what the protocol forbids."""

    code = "protocol_violation"
    status = 502


class HandoffFault(HoldfastError):
    """A decode worker could not start from what a prefill worker computed; nothing was generated from it.

    Nobody's mistake and no worker's fault: the same worker may compute the prompt itself.
    """

    code = "handoff_failed"
    fault = "internal"
    retry = "same"
    status = 503
    openai_type = "service_unavailable"
    hint = "Retry; if it persists look at the logs of the prefill and decode workers that are named."


class HandoffMismatch(HandoffFault):
    """The KV hand-off does not stand for the tokens of the request that brings it, or speaks another protocol."""

    code = "handoff_mismatch"


class HandoffLost(HandoffFault):
    """The KV blocks of a hand-off cannot be had: their worker is gone, or they did not come in time."""

    code = "handoff_lost"


class MigrationExhausted(HoldfastError):
    """Moved as often as its migration limit allows; the last cause is in ``details``."""

    code = "migration_exhausted"
    fault = "internal"
    retry = "later"
    status = 503
    openai_type = "service_unavailable"
    hint = "Retry; raise DYN_MIGRATION_LIMIT if workers are expected to fail this often."


class ShuttingDown(HoldfastError):
    """The frontend that held the stream is leaving, and its grace was over first."""

    code = "shutting_down"
    fault = "internal"
    retry = "later"
    status = 503
    openai_type = "service_unavailable"
    hint = "Send it again; raise DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS if answers take longer than that."


class InternalError(HoldfastError):
    """A fault in Holdfast itself."""


class RemoteError(HoldfastError):
    """An error whose code this version does not know; fault and retry come from the peer."""

    code = "remote_error"
