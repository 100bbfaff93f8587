"""One sequence inside the engine: its tokens, its rules, and how far its KV cache has come.

Must never call the engine library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import Finish, Sampling, StopRules

if TYPE_CHECKING:
    from holdfast.engines.llamacpp.guided import GrammarState
    from holdfast.engines.llamacpp.sampler import TokenSampler
    from holdfast.engines.llamacpp.slots import Slot


class Sequence:
    """Created on the event loop, then owned by the engine thread; only ``cancelled`` is set from the loop."""

    __slots__ = (
        "cached", "cancelled", "computed", "generated", "grammar", "key", "prompt", "sampler", "sampling", "scope",
        "slot", "stop", "stop_ids", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        key: SequenceKey,
        prompt: list[int],
        generated: list[int],
        sampling: Sampling,
        stop: StopRules,
        *,
        end_ids: tuple[int, ...],
        scope: str | None,
        grammar: GrammarState | None,
    ):
        self.key = key
        self.tokens = prompt + generated
        self.prompt = len(prompt)
        self.generated = len(generated)
        """Tokens generated so far over all attempts: the output index of the next one."""
        self.sampling = sampling
        self.stop = stop
        self.stop_ids = frozenset(stop.stop_token_ids) | (frozenset() if stop.ignore_eos else frozenset(end_ids))
        self.scope = scope
        """KV cache is shared only within one scope (cache salt)."""
        self.grammar = grammar
        self.sampler: TokenSampler | None = None
        self.slot: Slot | None = None
        self.computed = 0
        """Tokens whose KV is in the slot."""
        self.cached = 0
        """Prompt tokens that came from the prefix cache."""
        self.cancelled = False

    @property
    def pending(self) -> int:
        """Tokens not in the KV cache yet: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed

    def push(self, token: int) -> int:
        """Append a generated token; returns its output index."""
        self.tokens.append(token)
        self.generated += 1
        return self.generated - 1

    def finish_reason(self, context_length: int) -> Finish | None:
        """Return why the sequence is over after its last token, None when it goes on."""
        if not self.generated:
            return None
        if self.tokens[-1] in self.stop_ids and self.generated > self.stop.min_tokens:
            return "stop"
        if self.generated >= self.stop.max_tokens or len(self.tokens) >= context_length:
            return "length"
        return None
