"""What a canary asks an engine for: one token, as cheaply as that engine and role allow.

Every engine and role has a payload, so that no worker stays not ready for want of one. Whoever runs the
worker can replace it with ``DYN_HEALTH_CHECK_PAYLOAD`` (a JSON object, or ``@`` and a file's path); a value
that cannot be used is reported and ignored. `request_of` turns a payload into a request of ours; what only
the engine understands travels in ``extra``.

Must never import an engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.engines.contract import EngineInfo, GenerateRequest, ModelFiles, Sampling, StopRules, pack_ids

log = logging.getLogger(__name__)
T = TypeVar("T")

Role = Literal["aggregated", "decode", "prefill"]

PAYLOAD_VARIABLE = "DYN_HEALTH_CHECK_PAYLOAD"
MARK = "_HEALTH_CHECK"
"""Key that lets a handler recognise a canary."""
FAKE_BOOTSTRAP_HOST = "2.2.2.2"
"""SGLang's own constant: a disaggregated request with it takes the whole path without a peer."""
FALLBACK_BOS = 1
"""Begin-of-sequence id of most models; any id in the vocabulary does."""
_BOS_PATHS = (
    "bos_token_id",
    "tokenizer.bos_token_id",
    "tokenizer.tokenizer.bos_token_id",
    "llm.tokenizer.bos_token_id",
    "llm.tokenizer.tokenizer.bos_token_id",
    "tokenizer_manager.tokenizer.bos_token_id",
)
"""Where engines keep their tokenizer."""
_TEXT = "Test"


def read_payload(text: str, source: str = PAYLOAD_VARIABLE) -> dict[str, Any] | None:
    """Return the JSON object in ``text``, or in the file it names with ``@``; None when it is none, with a warning.

    Args:
        text: a JSON object, or ``@/path/file.json``; empty: None without a word.
        source: where it came from, for the warning.
    """
    if not text.strip():
        return None
    try:
        raw = Path(text[1:]).expanduser().read_bytes() if text.startswith("@") else text.encode()
        return msgspec.json.decode(raw, type=dict[str, Any])
    except OSError as error:
        why = f"{text[1:]} cannot be read ({error.strerror})"
    except (msgspec.DecodeError, ValueError) as error:
        why = f"it is not a JSON object ({error})"
    log.warning("%s is ignored: %s; canaries use the engine's own payload", source, why)
    return None


def load_health_check_from_env(
    variable: str = PAYLOAD_VARIABLE, environ: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Return the payload that the environment asks for; None when it asks for none or cannot be read."""
    return read_payload((os.environ if environ is None else environ).get(variable, ""), variable)


class HealthCheckPayload:
    """Base of all payloads: a subclass sets ``default_payload`` before it calls ``super().__init__()``.

    Args:
        override: text of a replacement, see `read_payload`; None: from the environment.

    Raises:
        NotImplementedError: the subclass has no ``default_payload``.
    """

    default_payload: dict[str, Any]

    def __init__(self, override: str | None = None):
        if not isinstance(getattr(self, "default_payload", None), dict):
            raise NotImplementedError(f"{type(self).__name__} must set default_payload before super().__init__()")
        self._override = load_health_check_from_env() if override is None else read_payload(override)
        if self._override is not None:
            try:
                request_of(self._override, model="", request_id="")
            except InvalidRequest as error:
                log.warning("%s is ignored: %s", PAYLOAD_VARIABLE, error.message)
                self._override = None

    @property
    def overridden(self) -> bool:
        """Whether a replacement is in use."""
        return self._override is not None

    def reject_override(self, why: str) -> None:
        """Give up the replacement, because the engine does not take it."""
        log.warning("%s is ignored from now on: the engine refused it (%s)", PAYLOAD_VARIABLE, why)
        self._override = None

    def to_dict(self) -> dict[str, Any]:
        """Return the payload in force."""
        return self.default_payload if self._override is None else self._override


class _Bos(msgspec.Struct, frozen=True):
    bos_token_id: int


def find_bos(source: object) -> int:
    """Return an engine's begin-of-sequence id.

    Args:
        source: an engine, a tokenizer, or whatever has one of them; None: unknown.
    """
    for path in _BOS_PATHS:
        found = source
        for step in path.split("."):
            found = getattr(found, step, None)
        if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
            return found
    log.debug("no begin-of-sequence id found on %s; canaries use %d", type(source).__name__, FALLBACK_BOS)
    return FALLBACK_BOS


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


def bos_of(files: ModelFiles) -> int | None:
    """Return the begin-of-sequence id by the model's own files; None when they do not say."""
    if not files.bos_token:
        return None
    try:
        tokenizer = msgspec.json.decode(files.tokenizer_json, type=_TokenizerFile)
    except msgspec.DecodeError:
        return None
    return next((token.id for token in tokenizer.added_tokens if token.content == files.bos_token), None)


def _vllm_stops() -> dict[str, Any]:
    return {
        "max_tokens": 1,
        "stop": None,
        "stop_token_ids": None,
        "include_stop_str_in_output": False,
        "ignore_eos": False,
    }


class VllmHealthCheckPayload(HealthCheckPayload):
    """vLLM, decode or aggregated: one greedy token after the begin of sequence, or after a word of text."""

    def __init__(self, engine: object = None, use_text_input: bool = False, override: str | None = None):
        if use_text_input:
            self.default_payload = {"prompt": _TEXT, "temperature": 0.0, **_vllm_stops(), MARK: True}
        else:
            self.default_payload = {
                "token_ids": [find_bos(engine)],
                "sampling_options": {"temperature": 0.0},
                "stop_conditions": _vllm_stops(),
                MARK: True,
            }
        super().__init__(override)


class VllmPrefillHealthCheckPayload(VllmHealthCheckPayload):
    """vLLM, prefill: the same request; a prefill worker hands its KV to nobody and answers with one token."""


class SglangHealthCheckPayload(HealthCheckPayload):
    """SGLang, aggregated."""

    def __init__(self, engine: object = None, use_text_input: bool = False, override: str | None = None):
        self.default_payload = {
            **({"prompt": _TEXT} if use_text_input else {"token_ids": [find_bos(engine)]}),
            "stop_conditions": {"max_tokens": 1, "ignore_eos": False},
            "sampling_options": {"temperature": 0.0, "top_p": 1.0, "top_k": -1},
            "eos_token_ids": [],
            "annotations": [],
            **self.more(engine),
        }
        super().__init__(override)

    def more(self, engine: object) -> dict[str, Any]:  # noqa: ARG002
        """Return what the role adds."""
        return {}


class SglangDisaggHealthCheckPayload(SglangHealthCheckPayload):
    """SGLang, decode or prefill: the same with a made-up peer, so that neither waits for the other half."""

    def more(self, engine: object) -> dict[str, Any]:
        """Return the bootstrap facts of a request without a peer."""
        port = getattr(getattr(engine, "server_args", None), "disaggregation_bootstrap_port", None)
        bootstrap = {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_port": port or 0, "bootstrap_room": 0}
        return {"bootstrap_info": bootstrap}


class TrtllmHealthCheckPayload(HealthCheckPayload):
    """TensorRT-LLM; decode and prefill workers do both halves of the canary themselves."""

    def __init__(self, engine: object = None, role: Role = "aggregated", override: str | None = None):
        self.default_payload = {
            "token_ids": [find_bos(engine)],
            "stop_conditions": {**_vllm_stops(), "min_tokens": 0},
            "sampling_options": {
                "temperature": 0.0,
                "top_p": 1.0,
                "top_k": 1,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": None,
            },
            MARK: True,
        }
        if role != "aggregated":
            self.default_payload["disaggregated_params"] = {"request_type": "context_and_generation"}
        super().__init__(override)


class TokenHealthCheckPayload(HealthCheckPayload):
    """Engines that take token ids and need nothing else: mock, llamacpp, generators of one's own."""

    def __init__(self, engine: object = None, override: str | None = None):
        self.default_payload = {
            "token_ids": [find_bos(engine)],
            "sampling_options": {"temperature": 0.0},
            "stop_conditions": {"max_tokens": 1, "ignore_eos": False},
            MARK: True,
        }
        super().__init__(override)


class MockHealthCheckPayload(TokenHealthCheckPayload):
    """The mock engine."""


class LlamaCppHealthCheckPayload(TokenHealthCheckPayload):
    """The embedded engine."""


def payload_for(
    info: EngineInfo, *, role: Role = "aggregated", text: bool = False, engine: object = None, override: str = ""
) -> HealthCheckPayload:
    """Return the payload for an engine and role.

    Args:
        info: what the started engine says; its files name the begin of sequence when the engine does not.
        role: which half of a request the worker does.
        text: the engine insists on text instead of token ids.
        engine: where to look for a tokenizer first; None: nowhere.
        override: replacement by the settings, see `read_payload`; empty: none.
    """
    known = bos_of(info.files)
    source: object = engine if engine is not None or known is None else _Bos(known)
    if info.engine == "vllm":
        kind = VllmPrefillHealthCheckPayload if role == "prefill" else VllmHealthCheckPayload
        return kind(source, text, override)
    if info.engine == "sglang":
        split = SglangHealthCheckPayload if role == "aggregated" else SglangDisaggHealthCheckPayload
        return split(source, text, override)
    if info.engine == "trtllm":
        return TrtllmHealthCheckPayload(source, role, override)
    plain = {"mock": MockHealthCheckPayload, "llamacpp": LlamaCppHealthCheckPayload}
    return plain.get(info.engine, TokenHealthCheckPayload)(source, override)


class _Stops(msgspec.Struct):
    max_tokens: int | None = 1
    min_tokens: int | None = 0
    ignore_eos: bool | None = False
    stop_token_ids: list[int] | None = None


class _Options(msgspec.Struct):
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    repetition_penalty: float | None = 1.0
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    seed: int | None = 0


class _Known(msgspec.Struct):
    """What of a payload has a place in our own request."""

    token_ids: tuple[int, ...] = (FALLBACK_BOS,)
    sampling_options: _Options = msgspec.field(default_factory=_Options)
    stop_conditions: _Stops = msgspec.field(default_factory=_Stops)


_PLACED = frozenset(_Known.__struct_fields__)


def request_of(payload: Mapping[str, Any], *, model: str, request_id: str, rank: int | None = None) -> GenerateRequest:
    """Return the request for a payload.

    Args:
        payload: as `HealthCheckPayload.to_dict` returns it.
        model: name that the worker serves.
        request_id: by which the worker knows its own canary.
        rank: data-parallel rank to ask, for engines with several; None: whichever.

    Raises:
        InvalidRequest: something in it has the wrong type.
    """
    try:
        known = msgspec.convert({key: payload[key] for key in _PLACED & payload.keys()}, _Known)
        prompt = pack_ids(known.token_ids)
    except (msgspec.ValidationError, OverflowError, TypeError) as error:
        raise InvalidRequest(f"not a canary payload: {error}") from error
    options, stops = known.sampling_options, known.stop_conditions
    return GenerateRequest(
        request_id=request_id,
        model=model,
        prompt_ids=prompt,
        sampling=Sampling(
            temperature=_or(options.temperature, 0.0),
            top_p=_or(options.top_p, 1.0),
            top_k=max(0, _or(options.top_k, 0)),
            repetition_penalty=_or(options.repetition_penalty, 1.0),
            presence_penalty=_or(options.presence_penalty, 0.0),
            frequency_penalty=_or(options.frequency_penalty, 0.0),
            seed=_or(options.seed, 0),
        ),
        stop=StopRules(
            max_tokens=max(1, _or(stops.max_tokens, 1)),
            min_tokens=_or(stops.min_tokens, 0),
            stop_token_ids=tuple(stops.stop_token_ids or ()),
            ignore_eos=bool(stops.ignore_eos),
        ),
        extra={
            **{key: value for key, value in payload.items() if key not in _PLACED},
            **({} if rank is None else {"data_parallel_rank": rank}),
        },
    )


def _or(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value
