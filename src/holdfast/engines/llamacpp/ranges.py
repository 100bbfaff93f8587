"""Writes a range of whole numbers as GBNF.

Must never admit leading zeros or a minus before zero.
"""

from __future__ import annotations

from collections.abc import Iterator

DIGITS = 15
"""Longest number without a bound: what a double holds exactly."""
_MOST = 10**DIGITS - 1


def integer_range(low: int | None, high: int | None) -> str:
    """Return a GBNF alternation that admits the integers from ``low`` to ``high`` (both included, None: open).

    An open side reaches to 15 digits. The range must not be empty.
    """
    low = -_MOST if low is None else low
    high = _MOST if high is None else high
    parts = []
    if low < 0:
        least = max(1, -high)
        parts += [f'"-" {part}' for part in _positive(least, -low)]
    if high >= 0:
        parts += _positive(max(low, 0), high)
    return " | ".join(parts)


def _positive(low: int, high: int) -> Iterator[str]:
    """Yield alternatives for low..high, both at least 0, one number of digits after the other."""
    while low <= high:
        end = min(high, 10 ** len(str(low)) - 1)
        yield _same_length(str(low), str(end))
        low = end + 1


def _same_length(low: str, high: str) -> str:
    """Return an expression for the numbers between two of the same number of digits."""
    if not low:
        return ""
    count = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" {_same_length(low[1:], high[1:])}'.strip()
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return f"[{low[0]}-{high[0]}]{_any(count)}"
    parts = [f'"{low[0]}" {_same_length(low[1:], "9" * count)}']
    if int(high[0]) - int(low[0]) > 1:
        parts.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}]{_any(count)}")
    parts.append(f'"{high[0]}" {_same_length("0" * count, high[1:])}')
    return f"({' | '.join(parts)})"


def _any(count: int) -> str:
    return f" [0-9]{{{count}}}" if count else ""
