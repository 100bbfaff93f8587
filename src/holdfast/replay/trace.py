"""Reads traces: one JSON object a line with ``timestamp``, ``input_length``, ``output_length`` and ``hash_ids``.

The format is the one that the Mooncake paper published its traces in. Time stamps are milliseconds since the start of
the trace and never go back; lengths are tokens; ``hash_ids`` has one id for each block of the prompt (512 tokens as
published, the last one perhaps incomplete), and equal ids stand for equal prompts up to that block. Other fields are
ignored.

Reads line by line: a trace may be longer than memory. Must never skip a bad line in silence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from holdfast.base.errors import InvalidRequest

TRACE_BLOCK = 512
"""Tokens for which one hash id stands in the published traces."""
_LINE_BYTES = 4 * 1024 * 1024
"""Longest line: a prompt of two hundred million tokens."""
_TOKENS = 16_777_216
"""Longest prompt or output, in tokens: beyond what any model takes, a typing error."""

_Length = Annotated[int, msgspec.Meta(ge=1, le=_TOKENS)]


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """One recorded request."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    """Milliseconds since the start of the trace."""
    input_length: _Length
    output_length: _Length
    hash_ids: tuple[int, ...]


class BadTrace(InvalidRequest):
    """A trace that can't be read; the message names the line and what is wrong with it."""

    code = "bad_trace"
    hint = 'A line is {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [id, …]}.'


_DECODER = msgspec.json.Decoder(TraceRequest)


def read_trace(path: Path, block: int = TRACE_BLOCK) -> Iterator[TraceRequest]:
    """Yield the requests of a trace file in order.

    Args:
        path: the file; empty lines are allowed.
        block: tokens for which one hash id stands.

    Raises:
        BadTrace: no such file, or a line that breaks the format.
    """
    try:
        with path.open("rb") as file:
            yield from parse_trace(iter(lambda: file.readline(_LINE_BYTES + 1), b""), block, str(path))
    except OSError as error:
        raise BadTrace(f"The trace {path} cannot be read: {error.strerror}.") from error


def parse_trace(lines: Iterable[bytes], block: int = TRACE_BLOCK, name: str = "trace") -> Iterator[TraceRequest]:
    """Yield the requests in these lines; arguments and errors as in `read_trace`."""
    before = 0.0
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        if len(line) > _LINE_BYTES:
            raise BadTrace(f"{where}: longer than {_LINE_BYTES} bytes.")
        if not line.strip():
            continue
        try:
            request = _DECODER.decode(line)
        except msgspec.ValidationError as error:
            raise BadTrace(f"{where}: {str(error).rstrip('.')}.") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadTrace(f"{where}: not JSON: {str(error).rstrip('.')}.") from error
        _check(request, block, before, where)
        before = request.timestamp
        yield request


def _check(request: TraceRequest, block: int, before: float, where: str) -> None:
    wanted = -(-request.input_length // block)
    if len(request.hash_ids) != wanted:
        raise BadTrace(
            f"{where}: input_length {request.input_length} needs {wanted} hash_ids at {block} tokens each, "
            f"{len(request.hash_ids)} are given.",
        )
    if request.timestamp < before:
        raise BadTrace(f"{where}: timestamp {request.timestamp:g} is before the line above it ({before:g}).")


def chosen(
    path: Path, block: int = TRACE_BLOCK, limit: int | None = None, max_output: int | None = None
) -> Iterator[TraceRequest]:
    """Yield the first requests of a trace, with answers of at most so many tokens; errors as in `read_trace`.

    Args:
        path: the file.
        block: tokens for which one hash id stands.
        limit: how many requests; None: all.
        max_output: tokens; None: as recorded.
    """
    for request in itertools.islice(read_trace(path, block), limit):
        if max_output is not None and request.output_length > max_output:
            yield msgspec.structs.replace(request, output_length=max_output)
        else:
            yield request
