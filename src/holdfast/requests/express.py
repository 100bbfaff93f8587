"""The short way of plain tokens, from a worker's frame to its client's socket, where it could be compiled.

A track belongs to one attempt of one stream whose events are a table look-up between two constant pieces: one streamed
choice, no stop strings, tools or log probabilities, a byte-level tokenizer, chunked HTTP/1.1 over plain TCP. `take` and
`deliver` do for the tokens of tracks what `CallerConnection`, `Attempt`, `Generation`, `StreamedChoice` and the
transport do in Python, on the same objects and attributes, so that both may take turns from token to token. What is
not plain when its token comes is left to those; they are what runs where nothing was compiled, where the client came
through TLS, and in the simulation, whose transports have no sockets.

Must never be the only one to know anything, but for the ids that a track has delivered (`Generation.generated` asks).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

__all__ = ["UNAVAILABLE", "VERSION", "Track", "native"]

VERSION = 1
"""Of the compiled module's interface; an older one that was left in a checkout is not used."""

UNAVAILABLE: str = ""
"""Why there are no tracks, for people; empty when there are."""

if TYPE_CHECKING:
    from holdfast.requests import _express as native
    from holdfast.requests._express import Track
else:
    native = Track = None
    try:
        from holdfast.requests import _express

        if _express.VERSION == VERSION:
            native, Track = _express, _express.Track
        else:
            UNAVAILABLE = f"it was compiled for interface {_express.VERSION}, this is {VERSION}: install again"
    except ImportError as error:
        built = find_spec("holdfast.requests._express") is not None
        UNAVAILABLE = f"it cannot be loaded: {error}" if built else "there was no C compiler when it was installed"
