"""Bugs that were planted and that no universe notices, each with the reason: the limits of what is proven here.

A unit test holds each of them all the same.
"""

from __future__ import annotations

import msgspec

from tests.sim.mutations.planting import Edit, change


class Unseen(msgspec.Struct, frozen=True, kw_only=True):
    """One of them."""

    name: str
    what: str
    why: str
    """Why nobody notices."""
    edits: tuple[Edit, ...]


UNSEEN = (
    Unseen(
        name="old-starts-farewell",
        what="the withdrawal of a worker's old start retires the new one",
        why="one worker fewer for 0.2 s at most, until its new record is seen; no stream fails for it",
        edits=(
            change(
                "runtime.pool",
                """
-        elif (event.purposeful and record.epoch == worker.epoch) or worker.draining:
+        elif event.purposeful or worker.draining:
""",
            ),
        ),
    ),
    Unseen(
        name="late-word-of-an-old-link",
        what="the loss of a worker's old connection is taken for the loss of its new one",
        why="links that are replaced are made deaf before they are closed, so that the second guard is never asked",
        edits=(
            change(
                "runtime.watch",
                """
-        if worker.link is not link:
-            return
         log.warning("lost the connection to worker %s: %s", worker.instance, error.message)
""",
            ),
        ),
    ),
    Unseen(
        name="record-overrules-the-connection",
        what="an old record of discovery changes the epoch of a worker whose new start is connected",
        why="the worker is connected anew at once, and the next look at discovery puts it right",
        edits=(
            change(
                "runtime.member",
                """
-        if record.epoch != self.record.epoch and self.link is None:
+        if record.epoch != self.epoch:
""",
            ),
        ),
    ),
    Unseen(
        name="queue-serves-the-last-comer-first",
        what="the queue in front of full workers is served from its end",
        why="a history does not tell who waited in which order; `tests/routing/test_queue.py` judges that by a model",
        edits=(
            change(
                "routing.queue",
                """
-        self.service: Key = (not promised, -rank.strict, turn, number)
+        self.service: Key = (not promised, -rank.strict, -turn, -number)
""",
            ),
        ),
    ),
    Unseen(
        name="retry-budget-is-never-empty",
        what="repeated attempts cost nothing",
        why="a budget of 100 and 10 a second is not used up by the few dozen streams of a universe",
        edits=(
            change(
                "requests.budget",
                """
         if self._saved < 1.0:
-            return False
+            return True
""",
            ),
        ),
    ),
)
