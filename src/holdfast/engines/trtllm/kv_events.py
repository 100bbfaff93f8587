"""From TensorRT-LLM's KV events to ours.

It numbers its events per rank, names blocks by unsigned 64-bit hashes, reports partly filled blocks too (dropped here,
with their removals), repeats the events of every attention window (the widest counts, which is announced when the
cache is created), and forgets events when its buffer overflows: a gap in the numbers clears what was told.

Must never know a connection or the engine.
"""

from __future__ import annotations

import logging
from typing import Any

from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

log = logging.getLogger(__name__)

_U64 = (1 << 64) - 1
PARTIAL_KEPT = 65_536
"""Names of partial blocks that are remembered per rank; the oldest are forgotten beyond."""
_MEDIA = ("GPU", "CPU")
"""By cache level: primary memory of the device, then memory of the host."""


class _Rank:
    __slots__ = ("known", "last", "lost", "partial", "window")

    def __init__(self) -> None:
        self.last: int | None = None
        self.partial: dict[int, None] = {}
        self.known: dict[int, str] = {}
        """Blocks told of, with where they are."""
        self.window: int | None = None
        self.lost = 0


class EventReader:
    """Keeps what is needed to read the events of all ranks.

    Args:
        block_size: tokens in a full block.
    """

    def __init__(self, block_size: int):
        self._block_size = block_size
        self._ranks: dict[int, _Rank] = {}

    @property
    def lost(self) -> int:
        """Events that never came."""
        return sum(rank.lost for rank in self._ranks.values())

    def read(self, event: dict[str, Any]) -> list[KvEvent]:
        """Return what one event means; nothing for events that only the engine itself cares about."""
        number = int(event.get("attention_dp_rank") or 0)
        rank = self._ranks.setdefault(number, _Rank())
        told = self._check_gap(rank, number, int(event["event_id"]))
        data, window = event["data"], event.get("window_size")
        kind = data.get("type")
        if kind == "created":
            rank.window = max(rank.window or 0, window or 0) or None
        elif window is None or rank.window is None or window == rank.window:
            if kind == "stored":
                told += self._stored(rank, number, data)
            elif kind == "removed":
                told += self._removed(rank, number, data)
            elif kind == "updated":
                told += self._moved(rank, number, data)
        return told

    def _check_gap(self, rank: _Rank, number: int, event_id: int) -> list[KvEvent]:
        last, rank.last = rank.last, event_id
        if last is None or event_id == last + 1:
            return []
        rank.lost += max(1, event_id - last - 1)
        log.warning(
            "KV events of rank %d go from %d to %d; what frontends know of this cache is cleared. Raise "
            "DYN_TRTLLM_EVENT_BUFFER if this repeats.",
            number,
            last,
            event_id,
        )
        rank.partial.clear()
        rank.known.clear()
        return [AllBlocksCleared(dp_rank=number)]

    def _stored(self, rank: _Rank, number: int, data: dict[str, Any]) -> list[KvEvent]:
        parent = data.get("parent_hash")
        parent = None if parent is None else parent & _U64
        if parent is not None and parent not in rank.known:
            return []  # it hangs on something that was lost
        hashes: list[int] = []
        tokens: list[int] = []
        medium = _MEDIA[0]
        for block in data["blocks"]:
            name = block["block_hash"] & _U64
            ids = block["tokens"]
            if len(ids) < self._block_size:
                _remember(rank.partial, name)
                break  # nothing can follow a block that is not full
            medium = _medium(block.get("cache_level"))
            hashes.append(name)
            tokens += [int(token["token_id"]) for token in ids]
            rank.known[name] = medium
        if not hashes:
            return []
        return [
            BlockStored(
                tuple(hashes),
                parent,
                tuple(tokens),
                self._block_size,
                medium=medium,
                dp_rank=number,
                lora=data.get("lora_name"),
                salt=data.get("cache_salt"),
            )
        ]

    def _removed(self, rank: _Rank, number: int, data: dict[str, Any]) -> list[KvEvent]:
        gone: dict[str, list[int]] = {}
        for raw in data["block_hashes"]:
            name = raw & _U64
            if name in rank.partial:
                del rank.partial[name]
                continue
            medium = rank.known.pop(name, None)
            if medium is not None:
                gone.setdefault(medium, []).append(name)
        return [BlockRemoved(tuple(names), medium=medium, dp_rank=number) for medium, names in gone.items()]

    def _moved(self, rank: _Rank, number: int, data: dict[str, Any]) -> list[KvEvent]:
        """A block that leaves the device's memory cannot be used there; where it went is not told onward."""
        level, name = data.get("cache_level"), data["block_hash"] & _U64
        if not isinstance(level, dict) or rank.known.get(name) != _MEDIA[0] or not level.get("new_value"):
            return []
        del rank.known[name]
        return [BlockRemoved((name,), dp_rank=number)]


def _medium(level: Any) -> str:
    return _MEDIA[min(int(level or 0), len(_MEDIA) - 1)]


def _remember(partial: dict[int, None], name: int) -> None:
    partial[name] = None
    if len(partial) > PARTIAL_KEPT:
        del partial[next(iter(partial))]
