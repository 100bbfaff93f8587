"""Which beginning of a prompt is a template: what many prompts begin with says nothing about where one belongs.

Remembers lately seen prompts as a tree. Where prompts part, the blocks above are shared by as many *different*
continuations as there are ends below; a conversation that grows is one end, however often it comes back. A shared
beginning of T tokens is a template when T / (continuations) is small: that is what each of them would pay if the
beginning were computed once more on every worker.

Must never know workers.
"""

from __future__ import annotations

from array import array

from holdfast.routing.prefixes import Node

TOKENS_EACH = 1024
"""Tokens that one continuation's share of computing its template again may be: some hundredths of a second."""
DEEPEST_TOKENS = 32_768
"""Nothing longer is taken for a template, which also bounds what is remembered of one prompt."""
REMEMBERED_BLOCKS = 1 << 19
"""Blocks after which a generation is old; three times as many are remembered at most, eight bytes each."""


class _Generation:
    """One tree; `Node.refs` counts different continuations."""

    __slots__ = ("blocks", "root")

    def __init__(self) -> None:
        self.root = Node(None, array("Q"), 0, 0)
        self.blocks = 0

    def note(self, hashes: array[int]) -> list[Node]:
        """Add a prompt; returns the nodes on its way, those that it made included."""
        way: list[Node] = []
        node, at, length = self.root, 0, len(hashes)
        while at < length:
            child = node.children.get(hashes[at])
            if child is None:
                self._grow(node, hashes, at, way)
                break
            at = child.common(hashes)
            if at < child.end and at < length:
                child = child.split(at)
            way.append(child)
            node = child
        return way

    def _grow(self, node: Node, hashes: array[int], at: int, way: list[Node]) -> None:
        """Hang what is new below a node; a prompt that goes on where another one ended is the same one, grown."""
        first = not node.children and node is not self.root
        child = node.children[hashes[at]] = Node(node, hashes, at, len(hashes), 1)
        self.blocks += len(hashes) - at
        if not first:
            for above in way:
                above.refs += 1
        way.append(child)


class Templates:
    """What the prompts of one model begin with."""

    __slots__ = ("_blocks", "_now", "_old", "_tokens_each")

    def __init__(self, *, blocks: int = REMEMBERED_BLOCKS, tokens_each: int = TOKENS_EACH) -> None:
        """``blocks``: of a generation; ``tokens_each``: 0: nothing is a template."""
        self._now, self._old = _Generation(), _Generation()
        self._blocks = blocks
        self._tokens_each = tokens_each

    def note(self, hashes: array[int], block_size: int) -> int:
        """Remember a prompt; returns how many of its leading blocks are a template, this prompt counted."""
        if not self._tokens_each or not hashes:
            return 0
        if len(hashes) * block_size > DEEPEST_TOKENS:
            hashes = hashes[: DEEPEST_TOKENS // block_size]
        if self._now.blocks >= self._blocks:
            self._old, self._now = self._now, _Generation()
        found = self._template(self._now.note(hashes), block_size)
        if self._old.blocks:
            found = max(found, self._template(self._old.note(hashes), block_size))
        return found

    def _template(self, way: list[Node], block_size: int) -> int:
        found = 0
        for node in way:
            if len(node.children) > 1 and node.end * block_size <= self._tokens_each * node.refs:
                found = node.end
        return found
