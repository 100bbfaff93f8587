"""Finds the known field that a misspelt one was meant to be.

Must never decide whether a field is accepted: that is `parse`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


def edit_distance(a: str, b: str, bound: int) -> int:
    """Return the number of edits between two words, or ``bound + 1`` when it is larger.

    Edits are insertion, deletion, replacement and the swap of two neighbours (optimal string
    alignment, a restricted Damerau-Levenshtein distance).
    """
    if abs(len(a) - len(b)) > bound:
        return bound + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row_before = before, row
        before, row = row_before, [i]
        for j, y in enumerate(b, 1):
            best = min(row_before[j] + 1, row[j - 1] + 1, row_before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, last[j - 2] + 1)
            row.append(best)
        if min(row) > bound:
            return bound + 1
    return min(row[-1], bound + 1)


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


def _tolerance(name: str) -> int:
    if len(name) < 4:
        return 0
    return 1 if len(name) < 8 else 2


@lru_cache(maxsize=1024)
def nearest(word: str, known: frozenset[str]) -> str | None:
    """Return the known name that ``word`` probably means, or None.

    The same letters with other case or separators (``maxTokens``, ``top-p``) always match; otherwise one
    edit is allowed for names of 4 to 7 characters and two for longer ones. Words of over 64 characters
    match nothing, so that a hostile body can't make this slow.
    """
    if len(word) > 64:
        return None
    plain, letters, length = _plain(word), frozenset(word), len(word)
    best: tuple[int, str] | None = None
    for candidate in _candidates(known):
        if candidate.plain == plain:
            return candidate.name
        bound = candidate.tolerance
        # an edit changes the length by at most one and the set of letters by at most two
        if abs(candidate.length - length) > bound or len(candidate.letters ^ letters) > 2 * bound:
            continue
        distance = edit_distance(word, candidate.name, bound)
        if distance <= bound and (best is None or distance < best[0]):
            best = (distance, candidate.name)
    return best[1] if best else None


class _Candidate(NamedTuple):
    name: str
    plain: str
    letters: frozenset[str]
    length: int
    tolerance: int


@lru_cache(maxsize=16)
def _candidates(names: frozenset[str]) -> tuple[_Candidate, ...]:
    return tuple(_Candidate(n, _plain(n), frozenset(n), len(n), _tolerance(n)) for n in sorted(names))
