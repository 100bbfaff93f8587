"""Sets of prompts as a compressed tree of block hashes: shared prefixes count once, and length costs nothing.

A sequence hash names its block and all before it, so two prompts share exactly their leading run of equal hashes, and
where two runs part is found by bisection. Adding, removing and matching a prompt of 6,000 blocks takes a few
microseconds; arrays are referred to, never copied.

Must never know workers, or what a prompt says.
"""

from __future__ import annotations

from array import array


class Node:
    """One run of blocks that the same prompts hold; the root's is empty."""

    __slots__ = ("children", "end", "hashes", "parent", "refs", "start")

    def __init__(self, parent: Node | None, hashes: array[int], start: int, end: int, refs: int = 0):
        self.parent = parent
        self.hashes = hashes
        self.start = start
        self.end = end
        self.refs = refs
        """Prompts that go through it or end in it."""
        self.children: dict[int, Node] = {}

    def common(self, hashes: array[int]) -> int:
        """Return up to which block ``hashes`` agree with this run; they do at its first one."""
        mine, low, high = self.hashes, self.start + 1, min(self.end, len(hashes))
        if mine[high - 1] == hashes[high - 1]:
            return high
        while low < high:
            middle = (low + high) // 2
            if mine[middle] == hashes[middle]:
                low = middle + 1
            else:
                high = middle
        return low

    def split(self, at: int) -> Node:
        """Cut the run in two; returns the new upper part. This node stays the lower one, so that its ends stay its."""
        parent = self.parent
        assert parent is not None
        upper = Node(parent, self.hashes, self.start, at, self.refs)
        parent.children[self.hashes[self.start]] = upper
        upper.children[self.hashes[at]] = self
        self.parent, self.start = upper, at
        return upper


_EMPTY = array("Q")


class Prefixes:
    """The prompts that are held now, each as often as it was added."""

    __slots__ = ("blocks", "root")

    def __init__(self) -> None:
        self.root = Node(None, _EMPTY, 0, 0)
        self.blocks = 0
        """Distinct blocks of all of them."""

    def add(self, hashes: array[int]) -> Node:
        """Hold a prompt; returns what `remove` wants."""
        node, at, length = self.root, 0, len(hashes)
        while at < length:
            child = node.children.get(hashes[at])
            if child is None:
                child = node.children[hashes[at]] = Node(node, hashes, at, length, 1)
                self.blocks += length - at
                return child
            at = child.common(hashes)
            if at < child.end:
                child = child.split(at)
            child.refs += 1
            node = child
        return node

    def remove(self, held: Node) -> None:
        """Let a prompt go that `add` has returned."""
        node = held
        while node.parent is not None:
            parent = node.parent
            node.refs -= 1
            if not node.refs:
                del parent.children[node.hashes[node.start]]
                self.blocks -= node.end - node.start
            elif len(node.children) == 1:
                self._join(node)
            node = parent

    def match(self, hashes: array[int]) -> int:
        """Return how many leading blocks of a prompt are held."""
        node, at, length = self.root, 0, len(hashes)
        while at < length:
            child = node.children.get(hashes[at])
            if child is None:
                break
            at = child.common(hashes)
            if at < child.end:
                break
            node = child
        return at

    def _join(self, node: Node) -> None:
        """Undo a split that nobody needs any more."""
        (child,) = node.children.values()
        if child.refs != node.refs or node.parent is None:
            return
        child.start, child.parent = node.start, node.parent
        node.parent.children[child.hashes[child.start]] = child
