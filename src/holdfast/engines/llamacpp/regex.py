"""Translates regular expressions to GBNF, llama.cpp's grammar notation.

Understood: literals, ``.``, classes, ``\\d \\w \\s`` and their negations (ASCII meaning), groups, alternation,
``? * + {m,n}`` (lazy marks are ignored: they do not change which texts match), ``^`` at the start and ``$`` at
the end. Lookaround, back references, word boundaries and flags are refused by name.

Must never guess at a construct it does not know.
"""

from __future__ import annotations

from collections.abc import Callable

from holdfast.base.errors import InvalidRequest, UnsupportedFeature

Ranges = list[tuple[int, int]]
"""Inclusive, sorted, disjoint ranges of code points."""

LAST = 0x10FFFF
REPEATS = 4096
"""Largest bound of a repetition; llama.cpp unrolls them."""

DIGIT: Ranges = [(0x30, 0x39)]
WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
SPACE: Ranges = [(0x09, 0x0D), (0x20, 0x20)]
_CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0x00}
_PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ")


def union(ranges: Ranges) -> Ranges:
    """Return the ranges sorted and merged."""
    merged: Ranges = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def complement(ranges: Ranges) -> Ranges:
    """Return every code point that is not in the ranges, surrogates aside."""
    result, start = [], 0
    for low, high in union([*ranges, (0xD800, 0xDFFF)]):
        if low > start:
            result.append((start, low - 1))
        start = high + 1
    if start <= LAST:
        result.append((start, LAST))
    return result


def _escaped(code: int) -> str:
    if chr(code) in _PLAIN:
        return chr(code)
    if code < 0x80:
        return f"\\x{code:02X}"
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def literal(text: str) -> str:
    """Return a GBNF literal."""
    return '"' + "".join(_escaped(ord(ch)) for ch in text) + '"'


def char_class(ranges: Ranges) -> str:
    """Return a GBNF character class."""
    inner = "".join(_escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}" for low, high in ranges)
    return f"[{inner}]"


def raw_chars(ranges: Ranges) -> str:
    """Write a set of characters as they are: for output that is plain text."""
    return char_class(ranges)


_JSON_ESCAPES = {0x22: '\\"', 0x5C: "\\\\", 0x08: "\\b", 0x0C: "\\f", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}


def json_chars(ranges: Ranges) -> str:
    """Write a set of characters as they appear inside a JSON string: some only escaped."""
    forbidden: Ranges = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F)]
    outside = union(complement(ranges) + forbidden)
    plain = complement(outside)
    parts = [char_class(plain)] if plain else []
    parts += [literal(text) for code, text in _JSON_ESCAPES.items() if any(a <= code <= b for a, b in ranges)]
    if not parts:
        raise UnsupportedFeature("A pattern demands a control character that JSON strings cannot hold.")
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


def repeat(item: str, low: int, high: int | None) -> str:
    """Return the GBNF for ``low`` to ``high`` (None: any number of) repetitions of an atom."""
    if max(low, high or 0) > REPEATS:
        raise UnsupportedFeature(f"A repetition of {max(low, high or 0)} is over the limit of {REPEATS}.")
    shorthand = {(0, 1): "?", (0, None): "*", (1, None): "+", (1, 1): ""}.get((low, high))
    if shorthand is not None:
        return item + shorthand
    return f"{item}{{{low},{'' if high is None else high}}}"


class _Parser:
    def __init__(self, pattern: str, chars: Callable[[Ranges], str]):
        self.text = pattern
        self.at = 0
        self.chars = chars

    def fail(self, what: str) -> UnsupportedFeature:
        return UnsupportedFeature(f"Regular expression: {what} at position {self.at} is not supported.")

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self) -> str:
        ch = self.peek()
        if not ch:
            raise InvalidRequest("The regular expression ends too early.")
        self.at += 1
        return ch

    def alternation(self, depth: int) -> str:
        if depth > 32:
            raise self.fail("nesting deeper than 32")
        branches = [self.sequence(depth)]
        while self.peek() == "|":
            self.take()
            branches.append(self.sequence(depth))
        return branches[0] if len(branches) == 1 else f"({' | '.join(branches)})"

    def sequence(self, depth: int) -> str:
        parts = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.quantified(depth))
        return " ".join(parts) if parts else '""'

    def quantified(self, depth: int) -> str:
        item = self.atom(depth)
        bounds = self.quantifier()
        if bounds is None:
            return item
        if self.peek() == "?":
            self.take()
        elif self.peek() in ("+", "*"):
            raise self.fail("a possessive or doubled quantifier")
        return repeat(item, *bounds)

    def quantifier(self) -> tuple[int, int | None] | None:
        simple: dict[str, tuple[int, int | None]] = {"?": (0, 1), "*": (0, None), "+": (1, None)}
        if self.peek() in simple:
            return simple[self.take()]
        if self.peek() != "{":
            return None
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at + 1 : end].partition(",")
        if end < 0 or not low.isdecimal() or not (high == "" or high.isdecimal()):
            raise self.fail("a quantifier other than {m}, {m,} and {m,n}")
        self.at = end + 1
        most = int(low) if not comma else (int(high) if high else None)
        if most is not None and most < int(low):
            raise InvalidRequest(f"The regular expression repeats from {low} down to {most}.")
        return int(low), most

    def atom(self, depth: int) -> str:
        ch = self.take()
        if ch == "(":
            return self.group(depth)
        if ch == "[":
            return self.chars(self.bracket())
        if ch == ".":
            return self.chars(complement([(0x0A, 0x0A)]))
        if ch == "\\":
            return self.chars(self.escape())
        if ch in "*+?{":
            raise InvalidRequest(f"The regular expression has nothing to repeat at position {self.at - 1}.")
        if ch in "^$":
            self.at -= 1
            raise self.fail(f"{ch!r} elsewhere than at the ends")
        return self.chars([(ord(ch), ord(ch))])

    def group(self, depth: int) -> str:
        if self.text.startswith("?:", self.at):
            self.at += 2
        elif self.text.startswith("?P<", self.at):
            end = self.text.find(">", self.at)
            if end < 0:
                raise InvalidRequest("The regular expression has an unfinished group name.")
            self.at = end + 1
        elif self.peek() == "?":
            raise self.fail(f"the group '({self.text[self.at : self.at + 2]}'")
        inner = self.alternation(depth + 1)
        if self.peek() != ")":
            raise InvalidRequest("The regular expression has an unclosed '('.")
        self.take()
        return f"({inner})"

    def escape(self) -> Ranges:
        ch = self.take()
        if ch.lower() in _CLASSES:
            ranges = _CLASSES[ch.lower()]
            return ranges if ch.islower() else complement(ranges)
        if ch in "xu":
            width = 2 if ch == "x" else 4
            digits = self.text[self.at : self.at + width]
            if len(digits) < width or any(d not in "0123456789abcdefABCDEF" for d in digits):
                raise InvalidRequest(f"The regular expression has a broken \\{ch} escape.")
            self.at += width
            return [(int(digits, 16), int(digits, 16))]
        if ch in _CONTROLS:
            return [(_CONTROLS[ch], _CONTROLS[ch])]
        if ch.isalnum():
            raise self.fail(f"'\\{ch}'")
        return [(ord(ch), ord(ch))]

    def bracket(self) -> Ranges:
        negated = self.peek() == "^"
        if negated:
            self.take()
        ranges: Ranges = []
        first = True
        while first or self.peek() != "]":
            first = False
            low = self.member()
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", "") and len(low) == 1:
                self.take()
                high = self.member()
                if len(high) != 1 or high[0][1] < low[0][0]:
                    raise InvalidRequest("The regular expression has a range that runs backwards.")
                low = [(low[0][0], high[0][1])]
            ranges += low
        self.take()
        return complement(ranges) if negated else union(ranges)

    def member(self) -> Ranges:
        ch = self.take()
        return self.escape() if ch == "\\" else [(ord(ch), ord(ch))]


def regex_to_gbnf(pattern: str, chars: Callable[[Ranges], str] = raw_chars, *, search: bool = False) -> str:
    """Return a GBNF expression that matches what ``pattern`` matches.

    Args:
        pattern: the regular expression.
        chars: writes a set of characters; `raw_chars` for plain text, `json_chars` inside a JSON string.
        search: the pattern may match anywhere in the text unless anchored (JSON schema's meaning);
            otherwise it must match the whole text.

    Raises:
        UnsupportedFeature: names the construct that is not understood.
        InvalidRequest: the pattern is not a regular expression.
    """
    body = pattern.removeprefix("^")
    closed = body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2 == 1
    parser = _Parser(body[:-1] if closed else body, chars)
    inner = parser.alternation(0)
    if parser.peek():
        raise InvalidRequest("The regular expression has a ')' without '('.")
    if not search:
        return inner
    anything = chars([(0, LAST)]) + "*"
    before = "" if pattern.startswith("^") else f"{anything} "
    after = "" if closed else f" {anything}"
    return f"{before}({inner}){after}"
