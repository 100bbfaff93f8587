"""Payloads too large for one frame: sent in parts over the bulk connection, put together at the worker.

The caller's side (`UploadSender`) writes only while the network takes more, a few uploads at a time in turn,
so that a small one is not stuck behind a large one. The worker's side (`UploadStore`) holds what has come for
one caller within limits of number and bytes. Must never touch the control connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from holdfast.base.errors import (
    CapacityExhausted,
    DeadlineExceeded,
    HoldfastError,
    PayloadTooLarge,
    ProtocolViolation,
    WorkerSaturated,
)
from holdfast.base.limits import (
    PART_BYTES,
    PAYLOAD_BYTES,
    PENDING_UPLOAD_BYTES_PER_CALLER,
    PENDING_UPLOADS_PER_CALLER,
    QUEUED_UPLOAD_BYTES_PER_LINK,
    QUEUED_UPLOADS_PER_LINK,
)
from holdfast.wire.frames import Part

SendPart = Callable[[int, int, bytes], None]
OnUploaded = Callable[[bytes | HoldfastError], None]

INTERLEAVED = 4
"""Uploads that are sent in turn at the same time."""
BURST_PARTS = 8
"""Parts written before the event loop gets its turn."""


def check_payload(size: int) -> None:
    """Raise PayloadTooLarge when a payload is over `limits.PAYLOAD_BYTES`."""
    if size > PAYLOAD_BYTES:
        raise PayloadTooLarge(
            f"the request has {size} bytes for its worker; at most {PAYLOAD_BYTES} travel",
            limit="PAYLOAD_BYTES",
            threshold=PAYLOAD_BYTES,
            actual=size,
        )


class _Outgoing:
    __slots__ = ("data", "number", "offset")

    def __init__(self, number: int, data: bytes):
        self.number = number
        self.data = memoryview(data)
        self.offset = 0


class UploadSender:
    """The caller's queue of uploads for one worker. Numbers rise, and so do the first parts on the wire."""

    def __init__(self) -> None:
        self._active: deque[_Outgoing] = deque()
        self._queued: deque[_Outgoing] = deque()
        self._bytes = 0
        self._last = 0

    def __bool__(self) -> bool:
        return bool(self._active or self._queued)

    def check_room(self, size: int) -> None:
        """Raise PayloadTooLarge or CapacityExhausted when a payload of ``size`` bytes cannot be queued."""
        check_payload(size)
        for limit, threshold, actual in (
            ("QUEUED_UPLOADS_PER_LINK", QUEUED_UPLOADS_PER_LINK, len(self._active) + len(self._queued) + 1),
            ("QUEUED_UPLOAD_BYTES_PER_LINK", QUEUED_UPLOAD_BYTES_PER_LINK, self._bytes + size),
        ):
            if actual > threshold:
                raise CapacityExhausted(
                    f"large requests to this worker are waiting: {actual} would be over {threshold} ({limit})",
                    limit=limit,
                    threshold=threshold,
                    actual=actual,
                )

    def next_number(self) -> int:
        """Return a fresh number for `add`."""
        self._last += 1
        return self._last

    def add(self, number: int, data: bytes) -> None:
        """Queue a payload."""
        self._queued.append(_Outgoing(number, data))
        self._bytes += len(data)

    def cancel(self, number: int) -> None:
        """Forget an upload; unknown and finished ones are ignored."""
        for queue in (self._active, self._queued):
            for upload in queue:
                if upload.number == number:
                    queue.remove(upload)
                    self._bytes -= len(upload.data)
                    return

    def send(self, part: SendPart, paused: Callable[[], bool]) -> bool:
        """Write parts until the network takes no more or the burst is over; returns whether more is to be sent."""
        for _ in range(BURST_PARTS):
            while self._queued and len(self._active) < INTERLEAVED:
                self._active.append(self._queued.popleft())
            if not self._active or paused():
                break
            upload = self._active.popleft()
            end = upload.offset + PART_BYTES
            part(upload.number, len(upload.data), bytes(upload.data[upload.offset : end]))
            upload.offset = end
            if end < len(upload.data):
                self._active.append(upload)
            else:
                self._bytes -= len(upload.data)
        return bool(self)

    def clear(self) -> None:
        """Forget all uploads that are not finished."""
        self._active.clear()
        self._queued.clear()
        self._bytes = 0


class _Incoming:
    __slots__ = ("idle_ticks", "on_done", "parts", "received", "total")

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.received = 0
        self.total = -1
        self.on_done: OnUploaded | None = None
        self.idle_ticks = 0

    @property
    def complete(self) -> bool:
        return self.received == self.total


class UploadStore:
    """What one caller has uploaded, or is uploading, to this worker."""

    def __init__(self) -> None:
        self._uploads: dict[int, _Incoming] = {}
        self._newest = 0
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes kept at the moment."""
        return self._bytes

    def claim(self, number: int, on_done: OnUploaded) -> None:
        """Ask for an upload; ``on_done`` is called once with the payload or the error, perhaps at once.

        Raises:
            ProtocolViolation: it was claimed, finished or dropped before.
        """
        upload = self._find(number)
        if upload is None or upload.on_done is not None:
            raise ProtocolViolation(f"upload {number} is not there or not free", frame="open", upload=number)
        upload.on_done = on_done
        self._finish_if_complete(number, upload)

    def part(self, frame: Part) -> None:
        """Take a piece. Pieces of uploads that were given up are dropped.

        Raises:
            ProtocolViolation: its sizes contradict what came before.
        """
        upload = self._find(frame.upload)
        if upload is None:
            return
        upload.idle_ticks = 0
        if upload.total < 0:
            upload.total = frame.total
        if frame.total != upload.total or not frame.data or upload.received + len(frame.data) > upload.total:
            raise ProtocolViolation(
                f"upload {frame.upload} announced {upload.total} bytes and sent {upload.received}; then came "
                f"{len(frame.data)} of {frame.total}",
                frame="part",
                upload=frame.upload,
            )
        error = self._over_limit(upload, len(frame.data))
        if error is not None:
            self._fail(frame.upload, error)
            return
        upload.parts.append(frame.data)
        upload.received += len(frame.data)
        self._bytes += len(frame.data)
        self._finish_if_complete(frame.upload, upload)

    def _find(self, number: int) -> _Incoming | None:
        if number > self._newest:
            self._newest = number
            self._uploads[number] = _Incoming()
        return self._uploads.get(number)

    def _over_limit(self, upload: _Incoming, more: int) -> HoldfastError | None:
        if upload.total > PAYLOAD_BYTES:
            try:
                check_payload(upload.total)
            except PayloadTooLarge as error:
                return error
        unclaimed = sum(1 for other in self._uploads.values() if other.on_done is None)
        for limit, threshold, actual in (
            ("PENDING_UPLOADS_PER_CALLER", PENDING_UPLOADS_PER_CALLER, unclaimed),
            ("PENDING_UPLOAD_BYTES_PER_CALLER", PENDING_UPLOAD_BYTES_PER_CALLER, self._bytes + more),
        ):
            if actual > threshold:
                return WorkerSaturated(
                    f"this caller's unfinished uploads are over the limit: {actual} of {threshold} ({limit})",
                    limit=limit,
                    threshold=threshold,
                    actual=actual,
                )
        return None

    def _finish_if_complete(self, number: int, upload: _Incoming) -> None:
        if upload.on_done is not None and upload.complete:
            self.drop(number)
            upload.on_done(b"".join(upload.parts))

    def _fail(self, number: int, error: HoldfastError) -> None:
        upload = self._uploads[number]
        self.drop(number)
        if upload.on_done is not None:
            upload.on_done(error)

    def drop(self, number: int) -> None:
        """Forget an upload; later pieces of it are dropped."""
        self._newest = max(self._newest, number)
        upload = self._uploads.pop(number, None)
        if upload is not None:
            self._bytes -= upload.received

    def tick(self, most_ticks: int) -> None:
        """Let time pass: an upload without a piece for more than ``most_ticks`` calls is given up."""
        for number, upload in list(self._uploads.items()):
            upload.idle_ticks += 1
            if upload.idle_ticks > most_ticks:
                self._fail(
                    number,
                    DeadlineExceeded(
                        f"{upload.received} of {max(upload.total, 0)} bytes of the request came, then nothing",
                        stage="upload",
                    ),
                )

    def fail(self, error: HoldfastError) -> None:
        """The bulk connection is lost: what has begun and is unfinished fails; the rest may come over the next one."""
        for number, upload in list(self._uploads.items()):
            if upload.received and not upload.complete:
                self._fail(number, error)
