"""Bugs of prompts that are computed apart: hand-offs that are believed, legs that leak, tokens that nobody owns."""

from __future__ import annotations

from holdfast.sim.plan import Shape
from tests.sim.mutations.bugs import Bug
from tests.sim.mutations.planting import change

SPLIT = Shape(split=True)

BUGS = (
    Bug(
        name="hand-off-is-believed",
        what="a decode worker starts from whatever blocks it is handed",
        origin="sglang#30233: a decode leg went on from an incomplete KV cache, with HTTP 200",
        edits=(
            change(
                "worker.host",
                """
-            verify(request.handoff, request.prompt_ids, request.generated_ids, protocol=self._protocol)
+            pass
""",
            ),
        ),
        caught_by=("P1",),
        within=200,
        shape=SPLIT,
    ),
    Bug(
        name="prefill-leg-outlives-its-stream",
        what="a client that leaves takes its decode leg with it and leaves the prefill leg behind",
        origin="ray#62953: retries and aborts that leak the other half of a request",
        edits=(
            change(
                "requests.prefill_leg",
                """
-            handle.kill(reason)
+            pass
""",
            ),
        ),
        caught_by=("P4", "P11"),
        within=60,
        shape=SPLIT,
    ),
    Bug(
        name="prefill-token-is-delivered",
        what="the token that a prefill engine makes on its way goes to the client, and the decode leg brings it again",
        edits=(
            change(
                "engines.mock.engine",
                """
-        return SequenceStep(sequence.key, sequence.index, [], finish="stop", handoff=handoff, cached_tokens=cached)
+        token = [sequence.chain.next_token(sequence.index)]
+        return SequenceStep(sequence.key, sequence.index, token, finish="stop", handoff=handoff, cached_tokens=cached)
""",
            ),
            change(
                "requests.prefill_leg",
                '''
         """Nobody's: the decode leg brings them all."""
+        self.generation._output.deliver(tokens, logprobs)
''',
            ),
        ),
        caught_by=("P1", "P3", "crash"),
        within=60,
        shape=SPLIT,
    ),
    Bug(
        name="prefill-claim-is-not-given-back",
        what="the load that a prompt was counted as stays on its prefill worker for ever",
        edits=(
            change(
                "requests.prefill_leg",
                """
         if handle is not None:
             handle.kill(reason)
-        self.placed.release(0)
""",
            ),
        ),
        caught_by=("P4",),
        shape=SPLIT,
    ),
    Bug(
        name="killer-prompt-goes-on-to-the-next-prefill-worker",
        what="a prefill worker that died under a prompt counts for nothing when it is judged",
        edits=(
            change(
                "requests.prefill_leg",
                """
         if died:
-            self.generation.driver.lost_prefill(self)
+            pass
""",
            ),
        ),
        caught_by=("P7",),
        within=200,
        shape=Shape(split=True, only=("killer-prompt", "engine-error"), faults=2),
    ),
    Bug(
        name="lost-twin-is-waited-for",
        what="a rendezvous whose prefill leg failed waits for it in silence",
        origin="aibrix#2289: the failure of the prefill half was only logged",
        edits=(
            change(
                "requests.prefill_leg",
                """
-        attempt = self.attempt
+        attempt = None
         if attempt is not None:
""",
            ),
        ),
        caught_by=("cause", "P13", "noticed"),
        within=200,
        shape=SPLIT,
    ),
)
