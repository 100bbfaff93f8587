"""What this worker takes: which model names, by which adapter each is meant, and whether anything at all just now.

Must never know a call or an engine.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from holdfast.base.errors import ModelNotFound, WorkerDraining
from holdfast.engines.contract import GenerateRequest

REMEMBERED = 1_024
"""Names of adapters that were here."""


class Offer:
    """Names of the base model never change; those of adapters come and go."""

    __slots__ = ("_adapters", "_base", "_gone", "closed")

    def __init__(self) -> None:
        self._base: frozenset[str] = frozenset()
        """Empty: any name will do."""
        self._adapters: frozenset[str] = frozenset()
        self._gone: dict[str, None] = {}
        self.closed = ""
        """Why nothing is taken at the moment, canaries aside; empty: it is."""

    def base(self, names: Iterable[str]) -> None:
        """Take the base model by these names from now on."""
        self._base = frozenset(names)

    def add(self, adapter: str) -> None:
        """Take an adapter by its name from now on."""
        self._adapters |= {adapter}
        self._gone.pop(adapter, None)

    def remove(self, adapter: str) -> None:
        """Take it no more. Callers that do not know yet are sent elsewhere."""
        self._adapters -= {adapter}
        self._gone[adapter] = None
        while len(self._gone) > REMEMBERED:
            del self._gone[next(iter(self._gone))]

    def admit(self, request: GenerateRequest, *, canary: bool) -> GenerateRequest:
        """Return the request as the engine shall have it: with its adapter, if its model is one.

        Raises:
            ModelNotFound: a name that was never served here.
            WorkerDraining: not now, or not any more; somebody else may.
        """
        if self.closed and not canary:
            raise WorkerDraining(f"This worker takes nothing at the moment: {self.closed}.")
        name = request.model
        if not self._base or name in self._base:
            return request if request.lora is None else msgspec.structs.replace(request, lora=None)
        if name in self._adapters:
            return request if request.lora == name else msgspec.structs.replace(request, lora=name)
        if name in self._gone:
            raise WorkerDraining(f"The adapter {name!r} was unloaded from this worker.")
        known = ", ".join(sorted(self._base | self._adapters))
        raise ModelNotFound(f"This worker does not serve {name!r} but {known}.", param="model")
