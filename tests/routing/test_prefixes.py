"""Sets of prompts: counted, matched and given back exactly, whatever the order."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from holdfast.kv.hashes import sequence_hashes
from holdfast.routing.prefixes import Node, Prefixes

PROMPTS = st.lists(st.integers(0, 2), max_size=12)


def chain(blocks: list[int]) -> array[int]:
    return sequence_hashes(block + 1 for block in blocks)


def test_shared_blocks_count_once() -> None:
    held = Prefixes()
    one, two = held.add(chain([1, 2, 3, 4])), held.add(chain([1, 2, 5]))
    assert held.blocks == 5
    assert held.match(chain([1, 2, 5, 9])) == 3
    held.remove(one)
    assert (held.blocks, held.match(chain([1, 2, 3, 4]))) == (3, 2)
    held.remove(two)
    assert held.blocks == 0
    assert not held.root.children


@given(st.lists(st.tuples(PROMPTS, st.integers(0, 3)), max_size=40))
def test_as_a_multiset_of_blocks(steps: list[tuple[list[int], int]]) -> None:
    held = Prefixes()
    live: list[tuple[array[int], Node]] = []
    for blocks, number in steps:
        if number == 0 and live:
            _, node = live.pop(len(blocks) % len(live))
            held.remove(node)
        else:
            hashes = chain(blocks)
            live.append((hashes, held.add(hashes)))
        union = {block for hashes, _ in live for block in hashes}
        assert held.blocks == len(union)
        asked = chain([*blocks, 1])
        assert held.match(asked) == next((i for i, h in enumerate(asked) if h not in union), len(asked))
    for _, node in live:
        held.remove(node)
    assert held.blocks == 0
    assert not held.root.children, "nothing is left"
