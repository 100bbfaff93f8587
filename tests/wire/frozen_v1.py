"""The codec of protocol version 1, frozen. Never change this file: it stands for peers that cannot be upgraded.

It shares no code with `holdfast.wire`.
"""

from __future__ import annotations

from typing import Any

import msgspec

VERSION = 1


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    code: str
    message: str
    fault: str = "internal"
    retry: str = "never"
    details: dict[str, Any] = {}


class OpenHeaders(msgspec.Struct, frozen=True, omit_defaults=True):
    request_id: str = ""
    label: str = ""
    attempt: int = 1
    choice: int = 0
    leg: str = "aggregated"
    traceparent: str = ""
    remaining_ms: int = 0
    priority: int = 0


class Progress(msgspec.Struct, array_like=True, frozen=True):
    steps: int = 0
    tokens: int = 0
    prefilled: int = 0
    phase: str = "idle"
    silent_step_seconds: float = 0.0
    in_flight: int = 0
    tokens_after_cancel: int = 0


class Load(msgspec.Struct, array_like=True, frozen=True):
    running: int = 0
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    prefill_tokens: int = 0


class Hello(msgspec.Struct, tag=1, array_like=True, frozen=True):
    version_min: int
    version_max: int
    caller: str
    channel: str
    instance: str = ""
    epoch: int = 0
    features: tuple[str, ...] = ()
    nonce: bytes = b""


class Auth(msgspec.Struct, tag=2, array_like=True, frozen=True):
    mac: bytes


class Part(msgspec.Struct, tag=3, array_like=True, frozen=True):
    upload: int
    total: int
    data: bytes


class Open(msgspec.Struct, tag=4, array_like=True, frozen=True):
    stream: int
    endpoint: str
    headers: OpenHeaders
    payload: bytes = b""
    upload: int = 0
    credit: int = 0


class Stop(msgspec.Struct, tag=5, array_like=True, frozen=True):
    stream: int
    reason: str = "cancelled"


class Kill(msgspec.Struct, tag=6, array_like=True, frozen=True):
    stream: int
    reason: str = "cancelled"


class Credit(msgspec.Struct, tag=7, array_like=True, frozen=True):
    stream: int
    tokens: int


class Ping(msgspec.Struct, tag=8, array_like=True, frozen=True):
    sequence: int


class Challenge(msgspec.Struct, tag=16, array_like=True, frozen=True):
    nonce: bytes


class Welcome(msgspec.Struct, tag=17, array_like=True, frozen=True):
    version: int
    instance: str
    epoch: int
    features: tuple[str, ...] = ()
    mac: bytes = b""


class Accept(msgspec.Struct, tag=18, array_like=True, frozen=True):
    stream: int


class Refuse(msgspec.Struct, tag=19, array_like=True, frozen=True):
    stream: int
    error: ErrorInfo


class Items(msgspec.Struct, tag=20, array_like=True, frozen=True):
    streams: bytes
    indices: bytes
    counts: bytes
    tokens: bytes


class Data(msgspec.Struct, tag=21, array_like=True, frozen=True):
    stream: int
    index: int
    payload: bytes


class End(msgspec.Struct, tag=22, array_like=True, frozen=True):
    stream: int
    finish: str
    error: ErrorInfo | None = None
    cached_tokens: int = 0


class Draining(msgspec.Struct, tag=23, array_like=True, frozen=True):
    reason: str = "shutdown"
    remaining_ms: int = 0


class Pong(msgspec.Struct, tag=24, array_like=True, frozen=True):
    sequence: int
    progress: Progress
    load: Load
    last_open: int = 0


CallerFrame = Hello | Auth | Part | Open | Stop | Kill | Credit | Ping
WorkerFrame = Challenge | Welcome | Accept | Refuse | Items | Data | End | Draining | Pong

_caller = msgspec.msgpack.Decoder(CallerFrame)
_worker = msgspec.msgpack.Decoder(WorkerFrame)


def encode(*frames: CallerFrame | WorkerFrame) -> bytes:
    out = b""
    for frame in frames:
        payload = msgspec.msgpack.encode(frame)
        out += len(payload).to_bytes(4, "little") + payload
    return out


def _split(data: bytes) -> list[bytes]:
    out = []
    while data:
        size = int.from_bytes(data[:4], "little")
        out.append(data[4 : 4 + size])
        data = data[4 + size :]
    return out


def read_caller(data: bytes) -> list[CallerFrame]:
    return [_caller.decode(payload) for payload in _split(data)]


def read_worker(data: bytes) -> list[WorkerFrame]:
    return [_worker.decode(payload) for payload in _split(data)]
