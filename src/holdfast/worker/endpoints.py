"""The endpoints beside ``generate`` and ``prefill``: files of the model card, and commands for engines that take them.

Must never serve anything but the files that the card names.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol, runtime_checkable

import msgspec

from holdfast.base.errors import HoldfastError, InternalError, InvalidRequest, NotFound, WorkerSaturated
from holdfast.base.limits import PART_BYTES
from holdfast.runtime.streams import IncomingCall

log = logging.getLogger(__name__)

GENERATE, PREFILL, ARTIFACT, CONTROL = "generate", "prefill", "artifact", "control"
PARTS_PER_TURN = 16
"""Parts sent before the event loop gets its turn (768 KiB)."""
TRANSFERS = 64
"""File transfers at once; more are refused."""
_HASH_BYTES = 64


class ArtifactEndpoint:
    """Sends files by content hash. Payload: SHA-256 in hex; answer: the file in order, in parts."""

    def __init__(self, files: dict[str, bytes]):
        self._files = files
        self._transfers: dict[int, _Transfer] = {}

    @property
    def active(self) -> int:
        """Transfers under way."""
        return len(self._transfers)

    def serve(self, call: IncomingCall) -> None:
        """Serve one call (a `CallHandler`)."""
        name = bytes(call.payload[:_HASH_BYTES]).decode("ascii", "replace")
        data = self._files.get(name)
        if data is None or len(call.payload) != _HASH_BYTES:
            call.refuse(NotFound(f"No file with SHA-256 {name!r} belongs to the models served here."))
            return
        if len(self._transfers) >= TRANSFERS:
            call.refuse(
                WorkerSaturated(
                    f"{TRANSFERS} files are being sent already.",
                    layer="artifact",
                    threshold=TRANSFERS,
                    actual=TRANSFERS,
                )
            )
            return
        transfer = _Transfer(self._transfers, call, data)
        self._transfers[id(transfer)] = transfer
        transfer.begin()


class _Transfer:
    """One file on its way, a few parts per turn of the event loop."""

    def __init__(self, table: dict[int, _Transfer], call: IncomingCall, data: bytes):
        self._table = table
        self._call = call
        self._data = data
        self._sent = 0
        self._loop = asyncio.get_running_loop()

    def begin(self) -> None:
        self._call.on_stop = lambda _: self._over("cancelled")
        self._call.accept()
        self._turn()

    def _turn(self) -> None:
        if id(self) not in self._table:
            return
        for _ in range(PARTS_PER_TURN):
            if self._sent >= len(self._data):
                self._over("done")
                return
            self._call.send_data(self._data[self._sent : self._sent + PART_BYTES])
            self._sent += PART_BYTES
        self._loop.call_soon(self._turn)

    def _over(self, finish: str) -> None:
        if self._table.pop(id(self), None) is not None:
            self._call.end(finish)


@runtime_checkable
class Controllable(Protocol):
    """An engine that takes commands, such as the mock engine's misbehaviour."""

    def control(self, command: dict[str, Any]) -> dict[str, Any]:
        """Obey one command and return the answer. Raises HoldfastError when it can't."""


class ControlEndpoint:
    """Passes JSON commands (``{"do": "hang"}``) to the engine and answers with JSON."""

    def __init__(self, engine: Controllable):
        self._engine = engine

    def serve(self, call: IncomingCall) -> None:
        """Serve one call (a `CallHandler`). Commands that kill the process are never answered."""
        try:
            command = msgspec.json.decode(call.payload, type=dict[str, Any])
            answer = self._engine.control(command)
        except msgspec.DecodeError as error:
            call.refuse(InvalidRequest(f'A command is a JSON object such as {{"do": "hang"}}: {error}.'))
            return
        except HoldfastError as error:
            call.refuse(error)
            return
        except Exception as error:
            log.exception("the engine failed on a command")
            call.refuse(InternalError(f"The engine failed on the command: {type(error).__name__}: {error}"))
            return
        call.accept()
        call.send_data(msgspec.json.encode(answer))
        call.end("done")
