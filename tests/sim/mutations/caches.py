"""Bugs in knowing what is in which KV cache: what comparable routers believe of workers that have it no more (P13)."""

from __future__ import annotations

from holdfast.sim.plan import Shape
from tests.sim.mutations.bugs import Bug
from tests.sim.mutations.planting import Edit, change

CACHES = Shape(profile="caches")
LOSSES = Shape(profile="caches", only=("kv-lost", "kv-reordered", "kv-repeated"), faults=6)

_NO_CHECK = change(
    "routing.knowledge_feed",
    """
-        if deltas.first != known.sequence + 1 or deltas.last < deltas.first:
+        if deltas.last < deltas.first:
             raise _LostTrackError("gap", f"batch {deltas.first} came after {known.sequence}")
""",
)
_NO_COUNTS = change(
    "routing.knowledge_feed",
    """
         self._must_follow()
-        if beat.sequence != known.sequence:
+        if True:
+            return
+        if beat.sequence != known.sequence:
             raise _LostTrackError("gap", f"it is at batch {beat.sequence}, the index at {known.sequence}")
""",
)

BUGS = (
    Bug(
        name="restart-keeps-blocks",
        what="what a worker held before it was started again is still believed, and nobody counts",
        origin="LDR#2853: the index keeps a restarted engine's blocks",
        edits=(
            _NO_COUNTS,
            Edit(
                "routing.knowledge",
                "        self.space.forget(self.instance)\n        self.epoch",
                "        self.epoch",
            ),
            Edit(
                "routing.knowledge_feed",
                "            known.clear()\n            self._snapshot",
                "            self._snapshot",
            ),
        ),
        caught_by=("P13",),
        shape=Shape(profile="caches", only=("crash", "terminate"), faults=5),
    ),
    Bug(
        name="lost-events-unnoticed",
        what="batches that are missing are not missed, and nobody counts",
        origin="LDR#2853: the default configuration ignores sequence numbers",
        edits=(_NO_CHECK, _NO_COUNTS),
        caught_by=("P13",),
        shape=LOSSES,
    ),
    Bug(
        name="late-frontend-is-blind",
        what="a frontend that comes later is told only what changes from then on",
        origin="llm-d-kv-cache#372: a router that restarts drops children without parents for ever",
        edits=(
            _NO_COUNTS,
            Edit(
                "worker.kv_publish",
                "        for rank, tier, hashes in slices:",
                "        for rank, tier, hashes in ():",
            ),
        ),
        caught_by=("P13",),
        shape=Shape(profile="caches", only=("crash", "reset"), faults=5),
    ),
    Bug(
        name="engine-is-believed",
        what="events that are lost between an engine and its log are gone for ever",
        origin="llm-d-kv-cache#593: no anti-entropy against the engine",
        edits=(Edit("worker.kv_publish", "        if ours == theirs:\n", "        if ours or theirs:\n"),),
        caught_by=("P13",),
        shape=LOSSES,
    ),
    Bug(
        name="reset-is-ignored",
        what="an engine that drops its whole cache and says so is believed to hold it still",
        origin="llm-d-kv-cache#537: AllBlocksCleared is not handled",
        edits=(
            Edit(
                "worker.kv_log",
                "        self._names.pop(rank, None)\n        self.index.clear(rank)\n",
                '        if rank >= 0:\n            return "ok"\n        self.index.clear(rank)\n',
            ),
        ),
        caught_by=("P13",),
        shape=LOSSES,
    ),
)
