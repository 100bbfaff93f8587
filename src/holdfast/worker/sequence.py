"""What the host keeps of one accepted call, when there is room for another, and an engine's words as the wire has them.

Must never call an engine or a caller.
"""

from __future__ import annotations

import asyncio

from holdfast.base.errors import WorkerSaturated
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import EngineLoad, SequenceStep
from holdfast.engines.handoff import Role
from holdfast.requests.leases import Lease
from holdfast.runtime.streams import IncomingCall
from holdfast.wire.frames import Load
from holdfast.worker.calls import CallStory


class Sequence:
    """One accepted call."""

    __slots__ = ("call", "deadline", "held", "key", "lease", "prefills", "story")

    def __init__(self, key: SequenceKey, call: IncomingCall, lease: Lease, story: CallStory, *, prefills: bool):
        self.story = story
        self.prefills = prefills
        """It is a prefill leg."""
        self.held = False
        """Its prompt is computed, and its blocks are kept for a decode worker."""
        self.key = key
        self.call = call
        self.lease = lease
        self.deadline: asyncio.TimerHandle | None = None


def check_room(role: Role, in_hand: int, limit: int, *, prefills: bool) -> None:
    """Raise unless a user's sequence may come in.

    Args:
        role: of this worker.
        in_hand: sequences in flight, and hand-offs that are kept.
        limit: of both together.
        prefills: it is a prefill leg.

    Raises:
        WorkerSaturated: another worker may have room.
    """
    if role == "prefill" and not prefills:
        raise WorkerSaturated(
            "This worker computes prompts only and takes no streams.",
            layer="worker",
            knob="DYN_DISAGGREGATION_MODE",
            threshold=0,
            actual=in_hand,
        )
    if in_hand >= limit:
        raise WorkerSaturated(
            f"{in_hand} sequences are in flight here; the limit is {limit} (DYN_ENGINE_REQUEST_LIMIT).",
            layer="worker",
            knob="DYN_ENGINE_REQUEST_LIMIT",
            threshold=limit,
            actual=in_hand,
        )


def load_frame(one: EngineLoad) -> Load:
    """Return an engine's load as a pong shows it."""
    ranks = tuple(load_frame(rank) for rank in one.ranks)
    return Load(one.running, one.waiting, one.kv_used_blocks, one.kv_total_blocks, one.prefill_tokens, ranks)


def logprob_tuples(step: SequenceStep) -> list[tuple[float, list[tuple[int, float]]]] | None:
    """Return the log probabilities of a step as plain tuples; None: there are none."""
    if step.logprobs is None:
        return None
    return [(one.logprob, list(one.top)) for one in step.logprobs]
