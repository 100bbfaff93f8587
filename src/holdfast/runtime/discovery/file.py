"""Discovery for one machine: a directory of records, leases kept by modification time.

One OS thread per participant renews the leases, watches the directory and judges it, so that neither a busy
event loop loses a lease nor a slow disk stalls a token. What it finds is applied on the loop. A file is
kept alive only by whoever wrote it last: a thawed process never renews the lease of its successor.

Must never block the event loop, and never treat an unreadable directory as an empty one.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from holdfast.base.errors import InternalError
from holdfast.base.ids import InstanceId
from holdfast.runtime.discovery.contract import DiscoveryEvent, InstanceRecord
from holdfast.runtime.discovery.directory import RecordDirectory, SupersededError
from holdfast.runtime.discovery.judge import Envelope, JudgeSettings, Stamp, StoreJudge
from holdfast.runtime.discovery.process import ProcessMark, is_dead, mark_of, this_host
from holdfast.runtime.discovery.view import ViewedDiscovery, encode_record

log = logging.getLogger(__name__)

MAX_COMMANDS = 1_024
STEP_DEADLINE = 5.0
"""Seconds that start, publish, withdraw and close wait for the thread; the work goes on behind."""


class FileSettings(msgspec.Struct, frozen=True):
    """Times in seconds."""

    judge: JudgeSettings = JudgeSettings()
    glance: float = 0.1
    """How often the directory is asked whether an entry came, went or was replaced."""
    look: float = 0.5
    """How often every entry and every owner's process is looked at."""

    @property
    def beat(self) -> float:
        """How often leases are renewed: four times per TTL, at least once a second."""
        return min(1.0, self.judge.ttl / 4)


class _Own:
    """A record that this process keeps alive."""

    __slots__ = ("data", "stamp")

    def __init__(self, data: bytes):
        self.data = data
        self.stamp: Stamp | None = None


class Keeper:
    """What runs in the thread: leases, watching, judging.

    Args:
        directory: where the records are.
        settings: how often what is done.
        report: receives events, in order.
        dead: says whether a process is provably dead.
    """

    def __init__(
        self,
        directory: RecordDirectory,
        settings: FileSettings,
        report: Callable[[list[DiscoveryEvent]], None],
        dead: Callable[[ProcessMark], bool],
    ):
        self._directory = directory
        self._settings = settings
        self._report = report
        self._judge = StoreJudge(settings.judge, directory.read, dead)
        self._own: dict[InstanceId, _Own] = {}
        self._next_beat = 0.0
        self._next_look = 0.0
        self._seen_ns = -1
        self._trouble = ""

    def publish(self, instance: InstanceId, data: bytes) -> None:
        """Write a record now; on failure every beat tries again."""
        own = self._own[instance] = _Own(data)
        self._attempt(lambda: self._write(instance, own))

    def withdraw(self, instance: InstanceId) -> None:
        """Bury an own record, unless a successor has replaced it."""
        own = self._own.pop(instance, None)
        if own is not None:
            self._attempt(lambda: self._bury(instance, own))

    def withdraw_all(self) -> None:
        """Bury all own records."""
        for instance in list(self._own):
            self.withdraw(instance)

    def turn(self, now: float, *, look: bool = False) -> None:
        """Do what is due: renew leases, look at the directory."""
        if now >= self._next_beat:
            self._next_beat = now + self._settings.beat
            for instance, own in list(self._own.items()):
                self._attempt(lambda i=instance, o=own: self._renew(i, o))  # type: ignore[misc]
        moved = self._entries_moved()
        if look or moved or now >= self._next_look:
            # A file system's clock may tick slower than we look, so the look after a change is followed by another.
            self._next_look = now if moved else now + self._settings.look
            self._look(now)

    def _entries_moved(self) -> bool:
        try:
            changed = self._directory.changed_ns()
        except OSError:
            return False
        moved = changed != self._seen_ns
        self._seen_ns = changed
        return moved

    def _look(self, now: float) -> None:
        try:
            listing = self._directory.list()
        except OSError as error:
            self._complain(f"cannot read the discovery directory {self._directory.root}: {error}; the last view stays")
            listing = None
        verdict = self._judge.look(now, listing)
        for kind, name, stamp in verdict.sweep:
            self._directory.sweep(kind, name, stamp)
        if verdict.events:
            self._report(verdict.events)

    def _write(self, instance: InstanceId, own: _Own) -> None:
        own.stamp = self._directory.write(instance, own.data)

    def _bury(self, instance: InstanceId, own: _Own) -> None:
        if own.stamp is not None and self._directory.is_ours(instance, own.stamp):
            self._directory.bury(instance)

    def _renew(self, instance: InstanceId, own: _Own) -> None:
        if own.stamp is None:
            self._write(instance, own)
            return
        try:
            own.stamp = self._directory.renew(instance, own.stamp, own.data)
        except FileNotFoundError:
            log.warning("the discovery entry of instance %s vanished; writing it again", instance)
            self._write(instance, own)
        except SupersededError:
            log.warning("instance %s was published again by another process; its lease is no longer ours", instance)
            self._own.pop(instance, None)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
            self._trouble = ""
        except OSError as error:
            self._complain(f"cannot write to the discovery directory {self._directory.root}: {error}; trying again")

    def _complain(self, text: str) -> None:
        if text != self._trouble:
            self._trouble = text
            log.warning("%s", text)


class FileDiscovery(ViewedDiscovery):
    """The `file` backend. Every process of one user on one machine meets in ``root``."""

    def __init__(self, root: Path, settings: FileSettings | None = None):
        super().__init__()
        self._settings = settings or FileSettings()
        self._directory = RecordDirectory(root)
        self._commands: queue.Queue[tuple[Callable[[Keeper], None], asyncio.Future[None]]] = queue.Queue(MAX_COMMANDS)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()

    async def start(self) -> None:
        """Prepare the directory, start the thread and wait for its first look."""
        self._loop = asyncio.get_running_loop()
        try:
            self._directory.prepare()
        except OSError as error:
            log.warning("cannot create the discovery directory %s: %s; trying again", self._directory.root, error)
        self._thread = threading.Thread(target=self._run, name="holdfast-discovery", daemon=True)
        self._thread.start()
        await self._do(lambda _keeper: None)

    async def publish(self, record: InstanceRecord) -> None:
        """Write the record and keep its lease alive from the thread."""
        encode_record(record)
        data = msgspec.json.encode(Envelope(record, mark_of(record.pid)))
        await self._do(lambda keeper: keeper.publish(record.instance, data))

    async def withdraw(self, instance: InstanceId) -> None:
        """Turn an own record into a tombstone, so that watchers learn that it was on purpose."""
        await self._do(lambda keeper: keeper.withdraw(instance))

    async def close(self) -> None:
        """Withdraw everything, stop the thread."""
        if self._thread is None or self._stopping.is_set():
            return
        await self._do(lambda keeper: keeper.withdraw_all())
        self._stopping.set()
        await asyncio.to_thread(self._thread.join, STEP_DEADLINE)

    async def _do(self, command: Callable[[Keeper], None]) -> None:
        """Hand a command to the thread and wait, boundedly, until it and a look at the directory are done."""
        if self._loop is None or self._stopping.is_set():
            raise InternalError("file discovery was used before start() or after close()")
        done: asyncio.Future[None] = self._loop.create_future()
        try:
            self._commands.put_nowait((command, done))
        except queue.Full:
            raise InternalError(
                f"more than {MAX_COMMANDS} discovery commands are waiting; the disk under {self._directory.root} hangs"
            ) from None
        try:
            await asyncio.wait_for(done, STEP_DEADLINE)
        except TimeoutError:
            log.warning(
                "the discovery directory %s did not answer for %g s; going on without it",
                self._directory.root,
                STEP_DEADLINE,
            )

    def _run(self) -> None:
        host = this_host()
        keeper = Keeper(self._directory, self._settings, self._report, lambda mark: is_dead(mark, host))
        while not self._stopping.is_set():
            try:
                self._turn(keeper)
            except Exception:
                log.exception("a turn of the discovery thread failed; leases go on")
                self._stopping.wait(self._settings.glance)

    def _turn(self, keeper: Keeper) -> None:
        try:
            command, done = self._commands.get(timeout=self._settings.glance)
        except queue.Empty:
            keeper.turn(time.monotonic())
            return
        try:
            command(keeper)
            keeper.turn(time.monotonic(), look=True)
        finally:
            self._on_loop(_finish, done)

    def _report(self, events: list[DiscoveryEvent]) -> None:
        self._on_loop(self._apply, events)

    def _on_loop(self, callback: Callable[..., None], argument: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            self._stopping.set()


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
