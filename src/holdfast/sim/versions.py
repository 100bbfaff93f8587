"""Processes of the oldest protocol version, for universes in the middle of a rolling upgrade.

They run today's code, except on the wire: an old worker chooses the oldest version with every caller, and its frames
end where they ended then; an old frontend offers nothing newer. Must never change what is said in a field that the
oldest version has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from holdfast.runtime.pool import WorkerPool
from holdfast.runtime.served import ServedConnection
from holdfast.runtime.server import WorkerServer
from holdfast.sim.history import History, Sequence
from holdfast.sim.watching import replace
from holdfast.wire.frames import OLDEST_VERSION, Data, End, Hello, Items, Pong, Welcome
from holdfast.wire.framing import PREFIX_BYTES
from holdfast.wire.outbox import Outbox
from holdfast.wire.worker import WorkerConnection

_FIRST_NEW_FIELD: dict[type[msgspec.Struct], str] = {
    Pong: "state",
    Items: "logprobs",
    Data: "more",
    End: "tokens",
    Welcome: "version_max",
}
"""What version 1 does not have, with everything behind it."""
_LENGTHS = {
    frame.__struct_config__.tag: 1 + frame.__struct_fields__.index(field) for frame, field in _FIRST_NEW_FIELD.items()
}
"""Elements of a frame of version 1, by tag; the tag is the first of them."""
_decode = msgspec.msgpack.Decoder(list[Any]).decode
_encode = msgspec.msgpack.Encoder().encode


def shortened(piece: bytes | bytearray) -> bytearray:
    """Return an encoded frame, length prefix included, as version 1 would have sent it."""
    fields = _decode(memoryview(piece)[PREFIX_BYTES:])
    payload = _encode(fields[: _LENGTHS.get(fields[0], len(fields))])
    return bytearray(len(payload).to_bytes(PREFIX_BYTES, "little") + payload)


class OldOutbox(Outbox):
    """Frames of version 1."""

    __slots__ = ()

    def put_encoded(self, pieces: list[bytearray]) -> None:
        """See `Outbox.put_encoded`."""
        super().put_encoded([shortened(piece) for piece in pieces])


class OldWorkerConnection(WorkerConnection):
    """The worker's end of a connection, by version 1."""

    @property
    def _lenient(self) -> bool:
        return self.hello is not None and self.hello.version_max > OLDEST_VERSION

    def _check_hello(self, hello: Hello) -> None:
        super()._check_hello(msgspec.structs.replace(hello, version_max=min(hello.version_max, OLDEST_VERSION)))
        self.hello = hello


def age_worker(server: WorkerServer) -> None:
    """Let a worker that has no caller yet speak version 1 only."""
    greet = server.greet

    def greet_of_old(connection: ServedConnection) -> WorkerConnection:
        core = greet(connection)
        core.__class__ = OldWorkerConnection
        core.outbox.__class__ = OldOutbox
        return core

    replace(server, "greet", greet_of_old)


def age_frontend(pool: WorkerPool) -> None:
    """Let a frontend that has no worker yet offer version 1 only."""
    pool.settings = msgspec.structs.replace(pool.settings, versions=(OLDEST_VERSION, OLDEST_VERSION))


def version_changes(history: History) -> Iterator[tuple[int, int]]:
    """Yield the versions of both workers for each move of a running stream from one to a worker of another version.

    A prompt that is computed elsewhere is no move.
    """
    versions = {(life.name, life.incarnation): life.version for life in history.lives}
    before: dict[tuple[str, int], Sequence] = {}
    for after in sorted(history.sequences, key=lambda sequence: sequence.request.attempt):
        if after.request.leg == "prefill":
            continue
        stream = after.label, after.request.choice
        last, before[stream] = before.get(stream), after
        if last is None or not after.label or not after.request.generated_ids or not after.tokens:
            continue
        old, new = versions[last.worker, last.incarnation], versions[after.worker, after.incarnation]
        if old != new:
            yield old, new
