"""Goes on where vLLM cannot: by generating what exists once more, unheard, and going on after it.

A grammar, a random generator and the counts of penalties are only right when the same request runs from its beginning.
It costs the time that the existing tokens took.

Must never deliver a token that follows other ones than those that exist.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from holdfast.base.errors import EngineFailed
from holdfast.engines.attempt import Output


async def replayed(outputs: AsyncGenerator[Output, None], existing: Sequence[int]) -> AsyncGenerator[Output, None]:
    """Yield what comes after the existing tokens.

    Args:
        outputs: of the same request, from its beginning.
        existing: ids that earlier attempts have delivered.

    Raises:
        EngineFailed: this engine generates something else, or less; it was not built or set up as the first one.
    """
    at = 0
    async with aclosing(outputs):
        async for output in outputs:
            repeated = min(len(existing) - at, len(output.tokens))
            if repeated:
                if output.tokens[:repeated] != list(existing[at : at + repeated]):
                    raise EngineFailed(
                        f"The text cannot be continued faithfully: from token {at} on, this engine generates another "
                        "one than the worker that began it."
                    )
                at += repeated
                output.tokens = output.tokens[repeated:]
                if output.logprobs is not None:
                    output.logprobs = output.logprobs[repeated:]
            if at < len(existing) and output.finish is not None and output.finish not in ("abort", "error"):
                raise EngineFailed(f"The text cannot be continued faithfully: here it ends after {at} tokens.")
            if output.tokens or output.finish is not None:
                yield output
