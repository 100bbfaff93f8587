"""Tokenize very large texts in other processes, so that small requests do not wait for the interpreter lock.

A few children (`text.offload_child`) are started when first needed, at low priority; a crashed one is replaced
and the text tried once more. Waiting is bounded in number and time. Must never let a child outlive its owner.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable

import msgspec

from holdfast.base.errors import (
    CapacityExhausted,
    DeadlineExceeded,
    ErrorInfo,
    InternalError,
    InvalidRequest,
)
from holdfast.base.restored import from_info
from holdfast.text.offload_child import ERROR, LENGTH, NEED, Header

_log = logging.getLogger(__name__)

LARGE_TEXT_CHARS = 256 * 1024
"""Texts over this are worth the way through another process; smaller ones take a thread 60 ms at most."""

_SLICE_CHARS = 256 * 1024
"""Characters encoded and written at a time: well under a millisecond of the event loop."""

_STREAM_LIMIT = 1024 * 1024
_decode_error = msgspec.msgpack.Decoder(ErrorInfo).decode


class _ChildLost(Exception):
    """The child closed its pipes."""


class _Child:
    """One process, used by one job at a time."""

    def __init__(self, process: asyncio.subprocess.Process):
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._input = process.stdin
        self._output = process.stdout

    @classmethod
    async def start(cls) -> _Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the working directory is nobody's module path
            "-m",
            "holdfast.text.offload_child",
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            limit=_STREAM_LIMIT,
        )
        return cls(process)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None and not self._output.at_eof()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(self, header: Header, loader: Callable[[], bytes], slices: list[bytes]) -> bytes:
        try:
            await self._send([msgspec.msgpack.encode(header)])
            kind, _ = await self._receive()
            if kind == NEED:
                await self._send([await asyncio.to_thread(loader)])
            await self._send(slices)
            kind, data = await self._receive()
        except (OSError, asyncio.IncompleteReadError) as error:
            raise _ChildLost from error
        if kind == ERROR:
            raise from_info(_decode_error(data))
        return data

    async def _send(self, parts: list[bytes]) -> None:
        self._input.write(LENGTH.pack(sum(map(len, parts))))
        for part in parts:
            self._input.write(part)
            await self._input.drain()

    async def _receive(self) -> tuple[bytes, bytes]:
        prefix = await self._output.readexactly(1 + LENGTH.size)
        (size,) = LENGTH.unpack_from(prefix, 1)
        parts: list[bytes] = []
        while size:  # in parts, because one read of many megabytes would hold the event loop
            part = await self._output.read(min(size, _STREAM_LIMIT))
            if not part:
                raise _ChildLost
            parts.append(part)
            size -= len(part)
        return prefix[:1], b"".join(parts)

    async def end(self, grace: float = 0.0) -> int | None:
        """Stop the process (by end of input if there is grace, in seconds) and return its exit code."""
        self._input.close()
        try:
            async with asyncio.timeout(grace):
                return await self._process.wait()
        except TimeoutError:
            pass
        if self._process.returncode is None:
            self._process.kill()
        return await self._process.wait()


class LargeTextPool:
    """Children that tokenize. Create on the event loop's thread, `close` when done."""

    def __init__(self, *, processes: int = 2, waiting: int = 32, timeout: float = 120.0):
        """Create the pool; nothing is started yet.

        Args:
            processes: most children at once.
            waiting: texts that may wait for a child; more are refused.
            timeout: bound for one text, waiting included, in seconds.
        """
        self._slots = asyncio.Semaphore(processes)
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._waiting = 0
        self._waiting_limit = waiting
        self._timeout = timeout
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the children that run."""
        return [child.pid for child in self._all if child.alive]

    async def encode(
        self,
        tokenizer: str,
        loader: Callable[[], bytes],
        text: str,
        *,
        add_special_tokens: bool = False,
        max_tokens: int | None = None,
    ) -> bytes:
        """Tokenize in a child.

        Args:
            tokenizer: SHA-256 of the tokenizer.json; children keep the last two.
            loader: returns that file; called in a thread when a child needs it.
            text: any size.
            add_special_tokens: see `Tokenizer.encode`.
            max_tokens: give up as soon as there are more.

        Returns:
            The ids as native u32 bytes, for ``array("I").frombytes``.

        Raises:
            InvalidRequest: not valid Unicode.
            ContextLengthExceeded: more than ``max_tokens``.
            CapacityExhausted: too many texts wait.
            DeadlineExceeded: not done in time.
            InternalError: two children died of it.
        """
        if self._waiting >= self._waiting_limit or self._closed:
            raise CapacityExhausted(
                f"{self._waiting} large prompts wait for tokenizing; at most {self._waiting_limit} may.",
                retry_after=1.0,
                layer="tokenize",
                threshold=self._waiting_limit,
                actual=self._waiting,
            )
        header = Header(tokenizer, add_special_tokens, max_tokens)
        self._waiting += 1
        waiting = True
        try:
            async with asyncio.timeout(self._timeout), self._slots:
                self._waiting -= 1
                waiting = False
                return await self._twice(header, loader, await _slices(text))
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"Tokenizing a prompt of {len(text)} characters took longer than {self._timeout:g} s.",
                stage="tokenize",
                bound=self._timeout,
            ) from error
        finally:
            self._waiting -= waiting

    async def _twice(self, header: Header, loader: Callable[[], bytes], slices: list[bytes]) -> bytes:
        code: int | None = None
        for _ in range(2):
            child = await self._take()
            try:
                result = await child.run(header, loader, slices)
            except _ChildLost:
                code = await self._discard(child)
                _log.warning("A text process (pid %d) died with exit code %s while tokenizing.", child.pid, code)
            except BaseException as error:
                await self._put_back(child, error)
                raise
            else:
                self._idle.append(child)
                return result
        raise InternalError(
            f"Tokenizing a prompt of {sum(map(len, slices))} bytes failed: two text processes died "
            f"(exit code {code}; -9 usually means that the machine ran out of memory).",
            exit_code=code,
        )

    async def _take(self) -> _Child:
        while self._idle:
            child = self._idle.pop()
            if child.alive:
                return child
            await self._discard(child)
        if self._closed:
            raise CapacityExhausted("The text processes are being shut down.", layer="tokenize")
        try:
            child = await _Child.start()
        except OSError as error:
            raise CapacityExhausted(
                f"No process for tokenizing a large prompt can be started: {error}.", retry_after=5.0, layer="tokenize"
            ) from error
        self._all.add(child)
        return child

    async def _put_back(self, child: _Child, error: BaseException) -> None:
        """Reuse a child that answered with an error; one that was interrupted is out of step, so it ends."""
        if isinstance(error, InvalidRequest | InternalError):
            self._idle.append(child)
        else:
            await self._discard(child)

    async def _discard(self, child: _Child) -> int | None:
        self._all.discard(child)
        return await asyncio.shield(child.end())

    async def close(self) -> None:
        """Stop all children within a second; texts in work fail."""
        self._closed = True
        children, self._all, self._idle = self._all, set(), []
        await asyncio.gather(*(child.end(grace=1.0) for child in children))


async def _slices(text: str) -> list[bytes]:
    """Encode a text without holding the event loop."""
    parts: list[bytes] = []
    for start in range(0, len(text), _SLICE_CHARS):
        try:
            parts.append(text[start : start + _SLICE_CHARS].encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest("The text is not valid Unicode: it contains a lone surrogate.") from error
        await asyncio.sleep(0)
    return parts
