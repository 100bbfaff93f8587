"""A grammar at a place in its text: which tokens may come next.

The state is a pure function of the grammar and the accepted tokens, so a continuation rebuilds it by accepting
the ids that are already there.

Must never hand llama.cpp a token that the grammar does not allow: the library would end the process.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from holdfast.base.errors import InternalError, InvalidRequest
from holdfast.engines.llamacpp.context import LlamaModel
from holdfast.engines.llamacpp.library import TokenDataArray

_RECORD = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_CHUNK = 64


class GrammarState:
    """One sequence's grammar. Not thread-safe; close it to free the library's memory."""

    def __init__(self, model: LlamaModel, gbnf: str):
        """Compile. Raises InvalidRequest when llama.cpp does not accept the grammar."""
        self._library = model.library
        self._forbidden = model.markers
        self._handle: int | None = self._library.sampler_init_grammar(model.vocab, gbnf.encode(), b"root")
        if not self._handle:
            reason = self._library.complaints[-1] if self._library.complaints else "no reason given"
            raise InvalidRequest(f"The grammar cannot be compiled: {reason}.", param="response_format")

    def first_allowed(self, ordered: npt.NDArray[np.int64]) -> int | None:
        """Return the first id that may come next, None when none may."""
        ordered = ordered[~self._forbidden[ordered]]
        for start in range(0, len(ordered), _CHUNK):
            records = np.zeros(min(_CHUNK, len(ordered) - start), _RECORD)
            records["id"] = ordered[start : start + _CHUNK]
            array = TokenDataArray(records.ctypes.data, len(records), -1, False)
            self._library.sampler_apply(self._handle, c.byref(array))
            allowed = np.flatnonzero(records["logit"] > -np.inf)
            if len(allowed):
                return int(records["id"][allowed[0]])
        return None

    def accept(self, token: int) -> None:
        """Move on by a token that `first_allowed` returned."""
        self._library.sampler_accept(self._handle, token)

    def replay(self, tokens: Sequence[int]) -> None:
        """Accept tokens generated elsewhere. Raises InternalError when one does not fit the grammar."""
        for index, token in enumerate(tokens):
            if self.first_allowed(np.array([token])) is None:
                raise InternalError(
                    f"The generated token at output index {index} does not satisfy the request's grammar; "
                    "the earlier attempt ran without it or with another one."
                )
            self.accept(token)

    def close(self) -> None:
        """Free the grammar. Idempotent."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.sampler_free(handle)
