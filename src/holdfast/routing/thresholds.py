"""The thresholds in force, per model: settings at first, changed and cleared while the fleet runs.

Every field of every model is a register of its own with a logical counter, so that frontends which tell each other
what they know end with the same values, whatever the order of the news and without comparing clocks: the greater
counter wins, then the greater name of who set it.

Must never do I/O or judge a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from holdfast.routing.saturation import THRESHOLD_NAMES, ThresholdName, Thresholds

META_PREFIX = "busy-threshold/"
"""Keys of a discovery record's ``meta`` that carry registers: prefix, field, slash, model."""

Value = float | int | None


class Register(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One field of one model as somebody set it. The order decides which of two is newer."""

    counter: int
    author: str
    """Who set it: equal counters are told apart by it."""
    value: float | int | None = None
    """None: cleared."""

    def newer(self, other: Register | None) -> bool:
        """Return whether this one replaces the other."""
        return other is None or (self.counter, self.author) > (other.counter, other.author)


class ThresholdBook:
    """All thresholds of one frontend.

    Args:
        author: name of this process, unique in the fleet.
        defaults: from the settings; in force for every field that nobody has set since.
    """

    def __init__(self, author: str, defaults: Thresholds):
        self._author = author
        self.defaults = defaults
        self._registers: dict[tuple[str, ThresholdName], Register] = {}
        self._counter = 0
        self._cache: dict[str, Thresholds] = {}
        self.on_change: Callable[[], None] = _nothing
        """Called after every change, so that waiting requests look again."""

    def of(self, model: str) -> Thresholds:
        """Return the thresholds in force for a model."""
        if not self._registers:
            return self.defaults
        found = self._cache.get(model)
        if found is None:
            set_here = {name: r.value for name in THRESHOLD_NAMES if (r := self._registers.get((model, name)))}
            if not set_here:
                return self.defaults
            found = self._cache[model] = msgspec.structs.replace(self.defaults, **set_here)
        return found

    def set(self, model: str, changes: Mapping[ThresholdName, Value]) -> None:
        """Set the fields that are named; None clears one, also against the settings. In force at once."""
        for name, value in changes.items():
            self._counter += 1
            self._registers[(model, name)] = Register(self._counter, self._author, value)
        if changes:
            self._changed()

    def export(self) -> dict[str, str]:
        """Return all registers as entries of a discovery record's ``meta``."""
        return {
            f"{META_PREFIX}{name}/{model}": msgspec.json.encode(register).decode()
            for (model, name), register in sorted(self._registers.items())
        }

    def merge(self, meta: Mapping[str, object]) -> bool:
        """Take over what is newer in somebody else's ``meta``; what is not understood is skipped.

        Returns:
            Whether anything changed.
        """
        news = False
        for key, text in meta.items():
            found = _parse(key, text)
            if found is None:
                continue
            place, register = found
            self._counter = max(self._counter, register.counter)
            if register.newer(self._registers.get(place)):
                self._registers[place] = register
                news = True
        if news:
            self._changed()
        return news

    def _changed(self) -> None:
        self._cache.clear()
        self.on_change()


def _parse(key: str, text: object) -> tuple[tuple[str, ThresholdName], Register] | None:
    if not key.startswith(META_PREFIX) or not isinstance(text, str):
        return None
    field, _, model = key[len(META_PREFIX) :].partition("/")
    name = next((n for n in THRESHOLD_NAMES if n == field), None)
    if name is None or not model:
        return None
    try:
        register = msgspec.json.decode(text, type=Register)
    except msgspec.DecodeError:
        return None
    return ((model, name), register)


def _nothing() -> None:
    return
