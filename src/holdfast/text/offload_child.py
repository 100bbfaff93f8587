"""The process that tokenizes very large texts for `text.offload`; run as ``python -m holdfast.text.offload_child``.

Speaks over standard input and output, one request at a time, each step length-prefixed (u64, little-endian):
header, answer (`NEED` or `HAVE` the tokenizer), the tokenizer if needed, the text, and at last the result (`IDS`
or `ERROR`). Dies with its parent, and goes when it has been idle for long. Must never log what it reads.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import sys
from collections import OrderedDict
from typing import BinaryIO

import msgspec

from holdfast.base.errors import HoldfastError, InternalError
from holdfast.text.tokenizer import Tokenizer

NEED, HAVE, IDS, ERROR = b"n", b"h", b"i", b"e"
LENGTH = struct.Struct("<Q")
IDLE_SECONDS = 300.0
_TOKENIZERS_KEPT = 2
_PR_SET_PDEATHSIG = 1


class Header(msgspec.Struct, array_like=True, frozen=True):
    """What is to be done with the text that follows."""

    tokenizer: str
    """SHA-256 of its tokenizer.json."""
    add_special_tokens: bool
    max_tokens: int | None


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone (Linux; elsewhere the closed pipe ends it).

    Args:
        parent: process id that the parent passed on; if it is gone already, this exits at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def _read(source: BinaryIO) -> bytes:
    prefix = source.read(LENGTH.size)
    if len(prefix) < LENGTH.size:
        raise EOFError
    (size,) = LENGTH.unpack(prefix)
    data = source.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _write(sink: BinaryIO, kind: bytes, data: bytes = b"") -> None:
    sink.write(kind + LENGTH.pack(len(data)))
    sink.write(data)
    sink.flush()


def _load(tokenizers: OrderedDict[str, Tokenizer], name: str, source: BinaryIO, sink: BinaryIO) -> None:
    """Make the tokenizer available; one that cannot be loaded is simply not there afterwards."""
    if name in tokenizers:
        tokenizers.move_to_end(name)
        _write(sink, HAVE)
        return
    _write(sink, NEED)
    data = _read(source)
    try:
        tokenizers[name] = Tokenizer(data)
    except InternalError as error:
        print(f"holdfast text process: {error.message}", file=sys.stderr)
    while len(tokenizers) > _TOKENIZERS_KEPT:
        tokenizers.popitem(last=False)


def serve(source: BinaryIO, sink: BinaryIO, wait: float = IDLE_SECONDS) -> None:
    """Answer requests until the input ends, or none came for ``wait`` seconds."""
    tokenizers: OrderedDict[str, Tokenizer] = OrderedDict()
    while select.select([source], [], [], wait)[0]:
        header = msgspec.msgpack.decode(_read(source), type=Header)
        _load(tokenizers, header.tokenizer, source, sink)
        data = _read(source)
        tokenizer = tokenizers.get(header.tokenizer)
        try:
            if tokenizer is None:
                raise InternalError(f"The model's tokenizer ({header.tokenizer[:12]}) cannot be loaded.")
            ids = tokenizer.encode(
                data.decode(), add_special_tokens=header.add_special_tokens, max_tokens=header.max_tokens
            )
        except HoldfastError as error:
            _write(sink, ERROR, msgspec.msgpack.encode(error.info()))
        else:
            _write(sink, IDS, ids.tobytes())
        del data


def main() -> None:
    """Run until the parent is gone."""
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the parent's to handle
    os.nice(10)  # many small requests in the parent come before one large one here
    # Unbuffered input, so that `select` sees everything that has not been read.
    with open(0, "rb", buffering=0, closefd=False) as raw, open(1, "wb", closefd=False) as sink:
        try:
            serve(_Whole(raw), sink)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError):
            return


class _Whole:
    """An unbuffered stream whose reads return all that was asked for, unless it ends."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw

    def fileno(self) -> int:
        return self._raw.fileno()

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        view, at = memoryview(buffer), 0
        while at < size:
            got = self._raw.readinto(view[at:])  # type: ignore[attr-defined]
            if not got:
                break
            at += got
        return bytes(view[:at])


if __name__ == "__main__":
    main()
