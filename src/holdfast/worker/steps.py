"""What an engine says in one step, sorted by who must be told: one batch for each caller's connection.

Must never send anything or end a sequence, and never await: this is the token path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from holdfast.base.errors import EngineFailed, HoldfastError, StreamIncomplete
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import SequenceStep
from holdfast.runtime.streams import ServerConnection, TokenItem
from holdfast.worker.sequence import Sequence, logprob_tuples

Batches = dict[ServerConnection, list[TokenItem]]
Finished = list[tuple[Sequence, SequenceStep]]


def by_caller(
    steps: list[SequenceStep], sequences: Mapping[SequenceKey, Sequence], clock: Callable[[], int]
) -> tuple[Batches, Finished, int]:
    """Sort a step's tokens by connection, and note the first of each sequence in its story.

    Args:
        steps: what each sequence got.
        sequences: those that somebody still waits for.
        clock: tells the time of first tokens, as `Calls.clock`.

    Returns:
        Tokens for each connection; the sequences that are through; how many tokens came for nobody.
    """
    batches: Batches = {}
    finished: Finished = []
    late = 0
    for step in steps:
        sequence = sequences.get(step.key)
        if sequence is None:
            late += len(step.tokens)
            continue
        if step.tokens:
            story = sequence.story
            story.tokens += len(step.tokens)
            if not story.first_token:
                story.first_token = clock()
            item = TokenItem(sequence.call, step.index, step.tokens, logprob_tuples(step))
            connection = sequence.call.connection
            batch = batches.get(connection)
            if batch is None:
                batches[connection] = [item]
            else:
                batch.append(item)
        if step.finish is not None:
            finished.append((sequence, step))
    return batches, finished, late


def error_of(step: SequenceStep) -> HoldfastError | None:
    """Return what a caller is told of the last step of its sequence; None: it went well."""
    if step.finish == "abort":
        return StreamIncomplete("The engine ended the sequence early without a reason.")
    if step.finish == "error":
        return step.error or EngineFailed("The engine reported an error without saying which.")
    return None
