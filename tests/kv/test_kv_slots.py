"""Slots: one for each worker and rank, the smallest free one first."""

import pytest

from holdfast.base.errors import CapacityExhausted
from holdfast.kv import slots as module
from holdfast.kv.slots import SlotTable


def test_slots_are_kept_found_and_given_back():
    table: SlotTable[str] = SlotTable()
    assert [table.assign("a"), table.assign("b", 0), table.assign("b", 1), table.assign("a")] == [0, 1, 2, 0]
    assert table.find("b", 1) == 2
    assert table.find("b", 2) is None
    assert table.find("c") is None
    assert table.owner(2) == ("b", 1)
    assert table.of_worker("b") == {0: 1, 1: 2}
    assert list(table) == [(0, "a", 0), (1, "b", 0), (2, "b", 1)]
    assert table.release("b") == (1, 2)
    assert table.release("b") == ()
    assert table.owner(2) is None
    assert table.owner(99) is None
    assert len(table) == 1
    assert [table.assign("c", 7), table.assign("d"), table.assign("e")] == [1, 2, 3]


def test_there_is_an_end(monkeypatch):
    monkeypatch.setattr(module, "MAX_SLOTS", 2)
    table: SlotTable[int] = SlotTable()
    table.assign(1)
    table.assign(2)
    with pytest.raises(CapacityExhausted, match="2 slots"):
        table.assign(3)
    assert table.assign(2) == 1
